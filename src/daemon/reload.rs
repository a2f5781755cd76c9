//! The command 'reload' of the control socket: what it may ask for, and what it answers (see CONTROL.md).

use super::Served;
use super::home::{Home, Outline, Reloaded};
use crate::error::{Error, ErrorKind, Result};
use crate::library::LeaseTarget;
use crate::redirect::{Current, Passed};
use crate::units::ImageId;
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Why a request is refused whose descriptors did not all come.
pub(super) const LOST: &str = "'reload': descriptors were lost on their way; raise the server's limit of open files";

/// Arguments of a reload by descriptors.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Arguments {
    /// Which descriptor is the map.
    map: usize,
    #[serde(default)]
    targets: Vec<PassedTarget>,
}

/// Which descriptor is which image.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PassedTarget {
    image: u32,
    generation: u64,
    fd: usize,
}

/// Changes to another map: to that of the library, or to the one that was passed.
///
/// # Errors
/// When there is none to change to, or anything is wrong with it; the server goes on with the one that it has.
pub(super) fn reload(served: &Served, arguments: &Value, fds: Vec<OwnedFd>) -> Result<Value> {
    let (current, home) = image_of(served)?;
    let done = match arguments {
        Value::Null => by_itself(current, home, &fds),
        Value::Object(none) if none.is_empty() => by_itself(current, home, &fds),
        _ => {
            let arguments: Arguments = serde_json::from_value(arguments.clone()).map_err(|e| usage(e.to_string()))?;
            let (map, passed) = sort(arguments, fds)?;
            home.reload_by(current, &map, passed)
        }
    }?;
    let Reloaded { old, new, closed } = done;
    Ok(json!({"old": outline(&old), "new": outline(&new), "closed": closed}))
}

/// A base, as answers tell of it.
pub(super) fn outline(base: &Outline) -> Value {
    let target = |t: &LeaseTarget| json!({"image": t.id, "generation": t.generation});
    json!({"entries": base.entries, "targets": base.targets.iter().map(target).collect::<Vec<_>>()})
}

fn image_of(served: &Served) -> Result<(&Arc<Current>, &Arc<Home>)> {
    served.drive.image().zip(served.home.as_ref()).ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            "'reload'",
            "what is served here is a raw file (--blk-file), which has no map",
        )
    })
}

fn by_itself(current: &Current, home: &Arc<Home>, fds: &[OwnedFd]) -> Result<Reloaded> {
    if fds.is_empty() {
        home.reload(current)
    } else {
        Err(usage(format!("{} descriptors came, and no arguments that say what they are", fds.len())))
    }
}

/// Which descriptor is what. Each is to be one thing, and none to be left.
fn sort(arguments: Arguments, fds: Vec<OwnedFd>) -> Result<(File, Vec<Passed>)> {
    let count = fds.len();
    let mut fds: Vec<Option<File>> = fds.into_iter().map(|fd| Some(File::from(fd))).collect();
    let mut take = |at: usize| match fds.get_mut(at).map(Option::take) {
        Some(Some(file)) => Ok(file),
        Some(None) => Err(usage(format!("descriptor {at} is named twice"))),
        None => Err(usage(format!("there is no descriptor {at}: {count} came"))),
    };
    let map = take(arguments.map)?;
    let mut passed: Vec<Passed> = Vec::with_capacity(arguments.targets.len());
    for PassedTarget { image, generation, fd } in arguments.targets {
        let file = take(fd)?;
        passed.push(Passed { image: ImageId(image), generation, file });
    }
    match fds.iter().position(Option::is_some) {
        None => Ok((map, passed)),
        Some(at) => Err(usage(format!("descriptor {at} is not named"))),
    }
}

fn usage(cause: String) -> Error {
    Error::new(ErrorKind::Usage, "'reload'", cause).mend("see CONTROL.md for what it takes")
}

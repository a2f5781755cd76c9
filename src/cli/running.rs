//! Asks the running servers of a library what they have done, by the control sockets that their leases name.

use super::control::ask_by;
use super::tell::connect;
use crate::error::Result;
use crate::library::{LeaseInfo, Library, Live, lease};
use crate::report::host::Server;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long all servers together may take: they are asked at the same time.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// The servers of the images of a sharing domain, or all, and what they answer to 'statistics'; in order of their images.
///
/// # Errors
/// When the leases cannot be read.
pub(super) fn servers(library: &Library, domain: Option<&str>) -> Result<Vec<Server>> {
    let mut leases = lease::live(library.dir())?;
    leases.retain(|lease| domain.is_none_or(|domain| is_of(library, lease, domain)));
    leases.sort_by_key(|lease| match lease {
        Live::Known(info) => (info.image_id, info.pid),
        Live::Unknown(_) => (u32::MAX, 0),
    });
    let (told, answers) = mpsc::channel();
    let mut servers: Vec<Server> = Vec::new();
    for (number, lease) in leases.into_iter().enumerate() {
        servers.push(match lease {
            Live::Unknown(path) => {
                let answer = Err("its lease makes no sense here".to_string());
                Server { image: path.display().to_string(), process: String::new(), socket: String::new(), answer }
            }
            Live::Known(info) => {
                let (server, control) = known(library, info);
                if let Some(control) = control {
                    let told = told.clone();
                    // Not waited for: one that hangs ends with this process.
                    std::thread::spawn(move || told.send((number, ask(&control))));
                }
                server
            }
        });
    }
    drop(told);
    let deadline = Instant::now() + ANSWER_TIME;
    while let Ok((number, answer)) = answers.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        if let Some(server) = servers.get_mut(number) {
            server.answer = answer;
        }
    }
    Ok(servers)
}

/// True for the lease of a server whose image is of that domain.
fn is_of(library: &Library, lease: &Live, domain: &str) -> bool {
    match lease {
        Live::Known(info) => library.images().iter().any(|r| r.id.0 == info.image_id && r.domain == domain),
        Live::Unknown(_) => false,
    }
}

/// A server that has not been asked yet, and where to ask it.
fn known(library: &Library, info: LeaseInfo) -> (Server, Option<std::path::PathBuf>) {
    let record = library.images().iter().find(|r| (r.id.0, r.generation) == (info.image_id, info.generation));
    let is_here = info.is_here();
    let answer = Err(match &info.control {
        _ if !is_here => format!("it runs on {}", info.host),
        None => "it has no control socket ('vmar serve --control')".to_string(),
        Some(_) => format!("the server does not answer within {} s", ANSWER_TIME.as_secs()),
    });
    let socket = info.control.as_deref().map_or(String::new(), |path| path.display().to_string());
    // Its present name.
    let image = record.map_or(info.image, |r| r.name.clone());
    let process = format!("{} on {}", info.pid, info.host);
    (Server { image, process, socket, answer }, info.control.filter(|_| is_here))
}

fn ask(control: &Path) -> std::result::Result<Value, String> {
    let ask = || ask_by(&connect(control, ANSWER_TIME)?, control, &json!({"execute": "statistics"}), &[]);
    ask().map_err(|e| e.to_string())
}

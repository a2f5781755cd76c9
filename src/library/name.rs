//! Names of images: they become file names, so only harmless ones are allowed.

use crate::error::{Error, ErrorKind, Result};

/// Longest name, in bytes.
const NAME_LEN_MAX: usize = 64;

/// Accepts `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
///
/// # Errors
/// `Usage` for everything else.
pub fn check_name(name: &str) -> Result<()> {
    let first_is_good = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest_is_good = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if first_is_good && rest_is_good && name.len() <= NAME_LEN_MAX {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Usage, format!("image name {name:?}"), "not allowed")
        .mend("use 1 to 64 of A-Z a-z 0-9 . _ - with a letter or digit first"))
}

/// Accepts also `NAME@N`, the name of an older content of the image NAME: it was its generation N.
pub(super) fn check_stored_name(name: &str) -> Result<()> {
    match name.split_once('@') {
        Some((name, generation)) if generation.parse::<u64>().is_ok_and(|n| n.to_string() == generation) => {
            check_name(name)
        }
        _ => check_name(name),
    }
}

/// The name of generation `generation` of an image after an update has taken its name.
pub fn kept_name(name: &str, generation: u64) -> String {
    format!("{name}@{generation}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_are_harmless_file_names() {
        for good in ["a", "9", "web-1.2_x", &"x".repeat(64)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        assert!(check_stored_name("web@1").is_ok() && check_name("web@1").is_err());
        assert_eq!(kept_name("web", 3), "web@3");
        for bad in ["web@", "web@x", "web@01", "web@1@2", "@1", "../web@1"] {
            assert!(check_stored_name(bad).is_err(), "{bad}");
        }
        for bad in ["", ".", "..", "-x", "_x", "a/b", "a b", "ä", "a\n", &"x".repeat(65)] {
            assert_eq!(check_name(bad).unwrap_err().kind(), ErrorKind::Usage, "{bad}");
        }
    }
}

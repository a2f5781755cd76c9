//! Two hosts on one library: writers in namespaces of their own, as on two machines with one directory.

use super::oracle;
use super::support::{Place, image_of};
use std::process::{Child, Command, Stdio};

/// Adds and removes images on "host" `name` until all commands got through; says whom it had to wait for.
fn host(place: &Place, name: &str, images: &[(String, std::path::PathBuf)]) -> Child {
    let mut script = String::from("hostname \"$1\"; shift\n");
    script.push_str("again() { until out=$(\"$@\" 2>&1); do case $out in *'is changing this library'*) echo \"$out\" ;; *) echo \"$out\"; exit 1 ;; esac; done; }\n");
    for (image, file) in images {
        script.push_str(&format!("again \"$@\" image add {image}={}\n", file.display()));
    }
    // The first one goes again, and comes back.
    if let Some((image, file)) = images.first() {
        script.push_str(&format!(
            "again \"$@\" image remove {image}\nagain \"$@\" image add {image}={}\n",
            file.display()
        ));
    }
    let mut command = Command::new("unshare");
    command.args(["--pid", "--uts", "--fork", "--kill-child", "sh", "-c", &script, "sh", name]);
    command.arg(env!("CARGO_BIN_EXE_vmar")).arg("--library").arg(place.lib());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("unshare is missing: apt install util-linux")
}

#[test]
fn two_hosts_change_one_library_in_turns() {
    let place = Place::new();
    let mut bytes = Vec::new();
    let mut images = |host: &str| -> Vec<(String, std::path::PathBuf)> {
        (0..10u32)
            .map(|n| {
                let name = format!("{host}-{n}");
                let from = n * 7 + host.len() as u32;
                let content = image_of(&(from..from + 40).collect::<Vec<_>>(), None);
                let file = place.raw(&format!("{name}.raw"), &content, |_| false);
                bytes.push((name.clone(), content));
                (name, file)
            })
            .collect()
    };
    let (first, second) = (images("one"), images("three"));
    let hosts = [host(&place, "host-one", &first), host(&place, "host-three", &second)];
    let mut waited = String::new();
    for child in hosts {
        let output = child.wait_with_output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{out}{err}");
        waited.push_str(&out);
    }
    assert!(waited.contains(" on host-one is changing") || waited.contains(" on host-three is changing"), "{waited}");
    let library = place.library();
    let expected: Vec<(&str, Vec<u8>)> = library
        .images()
        .iter()
        .map(|r| (r.name.as_str(), bytes.iter().find(|(name, _)| *name == r.name).unwrap().1.clone()))
        .collect();
    assert_eq!(expected.len(), 20);
    oracle::check(&place, &expected);
    place.assert_no_leftovers();
    place.ok(&["image", "verify"]);
}

//! Processes that are killed at any instant, several at once, and QEMUs that say nothing.

use crate::common::*;
use crate::guest::*;
use crate::qemu::Writes;
use crate::rig::*;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Saves that are killed.
const KILLS: u32 = 50;
/// Pages of a guest: 8 MiB.
const PAGES: u64 = 2048;

impl Rig {
    /// Starts a save with a spool of its own, and does not wait for its end.
    fn begin(&self, name: &str, qmp: &str, more: &[&str]) -> Child {
        let (state, spool) = (self.path("state"), self.path("own-spool"));
        fs::create_dir_all(&spool).unwrap();
        let args = [name, "--memory-only", "--qmp", qmp, "--state-dir", text(&state), "--spool", text(&spool)];
        let mut command = self.command("save", &[&args, more].concat());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }
}

/// Memory of which half is that of the earlier snapshots.
fn later(seed: u64) -> Vm {
    vm([guest(1, PAGES / 2), guest(seed, PAGES / 2)].concat())
}

/// Removes what killed processes have left in a spool: sockets, and nothing of any memory.
fn clear(spool: &Path) {
    for name in names(spool) {
        let dir = spool.join(&name);
        assert!(name.starts_with(".vmar-") && tree(&dir).is_empty(), "{name} is left in the spool");
        fs::remove_dir_all(dir).unwrap();
    }
}

#[test]
fn a_save_that_is_killed_at_any_instant_takes_nothing_with_it() {
    let rig = Rig::new(2);
    let (early, _) = rig.save("early", &vm(guest(1, PAGES)), &[]);
    let began = Instant::now();
    let (second, _) = rig.save("second", &later(2), &[]);
    let takes = began.elapsed();
    let mut published = 0;
    for n in 0..KILLS {
        // Evenly over the time that it takes, and a little more, in another order than that of time.
        let after = takes * (n * 7 % KILLS) * 11 / (KILLS * 10);
        let (name, vm) = (format!("killed{n}"), later(100 + u64::from(n)));
        let stream = vm.stream();
        let qemu = rig.running(&stream);
        let mut child = rig.begin(&name, text(&qemu.path), &[]);
        thread::sleep(after);
        let _ = child.kill();
        child.wait().unwrap();
        clear(&rig.path("own-spool"));
        eprintln!("seed {}: {name} was killed after {after:?}", 100 + n);
        let said = rig.run("check", &["--quick"]);
        let said: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
        assert_eq!(said["broken"].as_array().unwrap().len(), 0, "{name}: {said}");
        let listed = rig.ok("list", &[]);
        let listed = listed["snapshots"].as_array().unwrap();
        if listed.iter().any(|one| one["name"] == *name) {
            // Whoever sees it can rely on it.
            published += 1;
            rig.comes_back(&Saved { name: name.clone(), stream });
            assert!(rig.run("delete", &[&name]).status.success());
        }
        if n % 10 == 0 {
            rig.comes_back(&early);
            rig.comes_back(&second);
        }
    }
    eprintln!("{published} of {KILLS} were killed after they were published");
    assert!(published < KILLS / 2, "most were killed too late");
    // What they left: in the stores nothing after the next save and a repair; their memory never had a name.
    let (third, _) = rig.save("third", &later(3), &[]);
    for store in &rig.stores {
        assert!(names(&store.join("staging")).is_empty(), "staging of {}", store.display());
    }
    rig.ok("repair", &[]);
    let named = rig.ok("check", &[])["packs"].as_u64().unwrap();
    assert_eq!((rig.packs(0).len() as u64, rig.packs(1).len() as u64), (named, named), "packs that nobody names");
    for saved in [&early, &second, &third] {
        rig.comes_back(saved);
    }
    assert!(rig.run("delete", &["early", "second", "third"]).status.success());
    assert!(rig.packs(0).is_empty() && rig.packs(1).is_empty());
}

/// The VM goes on at once, and nothing of the save is left but packs that no snapshot names.
#[test]
fn a_save_that_is_told_to_end_lets_the_vm_go_on() {
    let rig = Rig::new(1);
    let (early, _) = rig.save("early", &vm(guest(1, 300)), &[]);
    let stream = later(5).stream();
    for (n, writes) in [Writes::NeverConnects, Writes::Stops(0), Writes::Stops(1 << 20)].into_iter().enumerate() {
        let qemu = rig.running(&stream);
        qemu.state().writes = writes;
        let child = rig.begin("new", text(&qemu.path), &[]);
        until(|| qemu.state().told.iter().any(|c| c == "migrate"));
        thread::sleep(Duration::from_millis(20 * n as u64));
        assert_eq!(qemu.state().status, "finish-migrate", "the VM stands still");
        let began = Instant::now();
        signal(child.id(), libc::SIGTERM);
        let out = child.wait_with_output().unwrap();
        assert!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
        line(&out, 1, &["snapshot", "stopped", "earlier snapshots are as they were"]);
        as_before(&qemu);
        assert_eq!(names(&rig.path("own-spool")), [""; 0]);
    }
    // While packs are written or hashes made: at some instant of a save that goes well.
    let began = Instant::now();
    let qemu = rig.running(&stream);
    assert!(rig.begin("long", text(&qemu.path), &[]).wait().unwrap().success());
    let takes = began.elapsed();
    let mut interrupted = 0;
    for n in 0..8 {
        let qemu = rig.running(&vm(guest(50 + n, PAGES)).stream());
        let child = rig.begin(&format!("n{n}"), text(&qemu.path), &[]);
        thread::sleep(takes * n as u32 / 8);
        signal(child.id(), libc::SIGTERM);
        let out = child.wait_with_output().unwrap();
        let ended = String::from_utf8_lossy(&out.stderr).contains("stopped; earlier snapshots");
        interrupted += u32::from(ended);
        // Before it has said that it wants to hear of signals it just ends.
        assert!(ended || out.status.success() || out.status.code().is_none(), "{out:?}");
        as_before(&qemu);
        let there = rig.ok("list", &[])["snapshots"].to_string().contains(&format!("\"n{n}\""));
        assert_eq!(there, out.status.success(), "n{n}");
    }
    assert!(interrupted > 0, "none was interrupted");
    rig.comes_back(&early);
    rig.ok("repair", &[]);
    rig.ok("check", &[]);
}

fn until(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not after 20 s");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_restore_that_is_killed_leaves_no_disk_under_its_name() {
    let rig = Rig::new(1);
    rig.image("base", &vec![1; 16 << 20]);
    let mut disk = rig.overlay("base");
    disk.write(0, &(0..3000).flat_map(|n| noise(90_000 + n)).collect::<Vec<_>>());
    let (saved, _) = rig.save("one", &vm(guest(1, 100)), &["--overlay", text(&disk.path)]);
    let (new, state) = (rig.path("new"), rig.path("state"));
    let args = ["one", "--overlay", text(&new), "--state-dir", text(&state)];
    let began = Instant::now();
    rig.ok("restore", &args);
    let takes = began.elapsed();
    fs::remove_file(&new).unwrap();
    let (mut halves, mut wholes) = (0, 0);
    for n in 0..12 {
        let mut child = rig.command("restore", &args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(takes * n / 11);
        let _ = child.kill();
        child.wait().unwrap();
        halves += u32::from(new.with_file_name(".new.arriving").exists());
        // Under its name it is complete, or it is not there.
        if new.exists() {
            wholes += 1;
            assert!(rig.disk(&new) == disk.model);
            fs::remove_file(&new).unwrap();
        }
    }
    assert!(halves > 0, "none was killed while it wrote");
    eprintln!("{halves} halves, {wholes} whole");
    // What is beside it is in nobody's way.
    rig.comes_back_from(&rig.stores, &saved, &["--overlay", text(&new)]);
    assert!(rig.disk(&new) == disk.model && !new.with_file_name(".new.arriving").exists());
}

#[test]
fn several_saves_at_once_go_well_and_of_one_name_one_does() {
    for round in 0..4 {
        let rig = Rig::new(2);
        let vms: Vec<Saved> =
            (0..3).map(|n| Saved { name: format!("vm{n}"), stream: later(20 + n).stream() }).collect();
        let qemus: Vec<_> = vms.iter().map(|saved| rig.running(&saved.stream)).collect();
        // The stores are not there yet: all of them want to make them.
        let children: Vec<_> = vms
            .iter()
            .zip(&qemus)
            .map(|(saved, qemu)| rig.begin(&saved.name, text(&qemu.path), &["--copies", "1"]))
            .collect();
        for (child, qemu) in children.into_iter().zip(&qemus) {
            went_well(child.wait_with_output().unwrap());
            as_before(qemu);
        }
        vms.iter().for_each(|saved| rig.comes_back(saved));
        rig.ok("check", &[]);
        // The same name: one wins, and it is the same one in all stores, in whichever order they are named.
        let children: Vec<_> = qemus.iter().map(|qemu| rig.begin("same", text(&qemu.path), &[])).collect();
        let outs: Vec<Output> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
        let won: Vec<usize> = (0..3).filter(|n| outs[*n].status.success()).collect();
        assert_eq!(won.len(), 1, "round {round}: {won:?}");
        let losers = outs.iter().filter(|out| !out.status.success());
        losers.for_each(|out| drop(line(out, 1, &["snapshot same", "is there already", "take another name"])));
        qemus.iter().for_each(as_before);
        rig.comes_back(&Saved { name: "same".into(), stream: vms[won[0]].stream.clone() });
        rig.ok("check", &[]);
    }
}

#[test]
fn nobody_deletes_while_somebody_saves_nor_the_other_way_round() {
    let rig = Rig::new(2);
    let (early, _) = rig.save("early", &vm(guest(1, 300)), &[]);
    let stream = later(6).stream();
    let qemu = rig.running(&stream);
    qemu.state().writes = Writes::Stops(1 << 20);
    let child = rig.begin("new", text(&qemu.path), &[]);
    until(|| qemu.state().told.iter().any(|c| c == "migrate"));
    for (verb, args) in [("delete", &["early"][..]), ("repair", &[])] {
        line(&rig.run(verb, args), 1, &["store0", "another process writes there", "wait for its end"]);
    }
    // Who reads is in nobody's way, and another VM can be saved.
    rig.comes_back_from(&rig.stores, &early, &[]);
    rig.ok("check", &[]);
    went_well(rig.save_with(&rig.running(&stream), "other", &[]));
    signal(child.id(), libc::SIGTERM);
    line(&child.wait_with_output().unwrap(), 1, &["stopped"]);
    as_before(&qemu);
    assert!(rig.run("delete", &["other"]).status.success());
    // Somebody who is alone there: as long as a delete takes.
    let mark = fs::File::open(rig.stores[1].join("vmar-snapshots")).unwrap();
    mark.lock().unwrap();
    qemu.state().writes = Writes::All;
    let told = qemu.state().told.len();
    line(&rig.save_with(&qemu, "new", &[]), 1, &["store1", "another process writes there", "wait for its end"]);
    assert_eq!(qemu.state().told.len(), told, "the VM was disturbed");
    mark.unlock().unwrap();
    went_well(rig.save_with(&qemu, "new", &[]));
    rig.comes_back(&early);
}

/// All at once, because each takes as long as the patience with it: 30 s for an answer, 60 s for a byte.
#[test]
fn a_qemu_that_says_nothing_is_given_up_and_runs_on() {
    let rig = Rig::new(1);
    let (early, _) = rig.save("early", &vm(guest(1, 300)), &[]);
    let stream = later(7).stream();
    let stores: Vec<PathBuf> = (0..6).map(|n| rig.path(&format!("own{n}"))).collect();
    let begin = |n: usize, mute, writes| {
        let qemu = rig.running(&stream);
        (qemu.state().mute, qemu.state().writes) = (mute, writes);
        let spool = rig.path(&format!("spool{n}"));
        fs::create_dir(&spool).unwrap();
        let args = ["new", "--memory-only", "--qmp", text(&qemu.path), "--spool", text(&spool)];
        let mut command = rig.command_in(&stores[n..=n], "save", &args);
        (command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap(), qemu, spool)
    };
    let mut under_way = vec![
        (begin(0, Some("greeting"), Writes::All), "QEMU's monitor"),
        (begin(1, Some("query-status"), Writes::All), "query-status"),
        (begin(2, Some("stop"), Writes::All), "QEMU's monitor"),
        (begin(3, Some("migrate"), Writes::All), "migrate"),
        (begin(4, None, Writes::NeverConnects), "QEMU says nothing for 60 s; see its log"),
        (begin(5, None, Writes::Stops(1 << 20)), "QEMU says nothing for 60 s; see its log"),
    ];
    for ((child, qemu, spool), why) in under_way.drain(..) {
        let out = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("vmar: ")).collect();
        assert!(out.status.code() == Some(1) && lines.len() == 1 && lines[0].contains(why), "{why}: {said}");
        as_before(&qemu);
        assert!(names(&spool).is_empty());
    }
    rig.comes_back(&early);
}

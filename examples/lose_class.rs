//! Makes of a snapshot one that has zeros for all pages of some classes: what a guest notices when they are lost.
//!
//! ```text
//! cargo run --release --example lose_class -- NAME NEW --store DIR [--store DIR...] --class cache-clean [--class ...]
//! ```
//!
//! The negative control of the rule that says what may be lost (docs/snapshots.md): pages of clean page cache "can be read again from
//! disk", yet a guest that gets zeros for them reads zeros from its files.

use clap::Parser;
use std::process::ExitCode;
use vmar::error::Result;
use vmar::introspect::Class;
use vmar::snapshot::stores::{Access, Stores};
use vmar::store::manifest::Page;

#[derive(Parser)]
struct Arguments {
    /// The snapshot.
    name: String,
    /// Name of the one to make.
    new: String,
    /// Where it is.
    #[arg(long = "store", required = true)]
    stores: Vec<String>,
    /// What is lost.
    #[arg(long = "class", required = true, value_parser = class)]
    classes: Vec<Class>,
}

fn class(name: &str) -> Result<Class, String> {
    Class::ALL.into_iter().find(|class| class.name() == name).ok_or_else(|| "no class has this name".into())
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(lost) => {
            println!("{lost} pages lost");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<usize> {
    let stores = Stores::open(&arguments.stores, Access::Write)?;
    let mut snapshot = stores.load(&arguments.name)?;
    let mut lost = 0;
    for (page, class) in snapshot.memory.pages.iter_mut().zip(&snapshot.classes) {
        if arguments.classes.contains(class) && *page != Page::ZERO {
            *page = Page::ZERO;
            lost += 1;
        }
    }
    snapshot.about.name.clone_from(&arguments.new);
    stores.publish(&snapshot)?;
    Ok(lost)
}

//! `vmar image repair`: mends bad blocks of an image from the images that hold the same.

use super::Common;
use super::image::stop_on_signals;
use super::output::{Progress, print_json};
use crate::error::{Error, ErrorKind, Result};
use crate::indexer::Work;
use crate::indexer::repair::{Cure, Options, Repaired, repair};
use crate::library::Library;
use crate::units::BLOCK_SIZE;

/// Arguments of `vmar image repair`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image
    name: String,
    /// Only this block (byte offset / 4096), without reading the whole image first; default: all that are bad
    #[arg(long, value_name = "N")]
    block: Option<u32>,
    /// Only say which blocks are bad, and where their contents are
    #[arg(long)]
    dry_run: bool,
    /// Write into an image file that vmar did not make, which it does not do otherwise
    #[arg(long)]
    in_place: bool,
}

/// Runs the verb.
pub fn run(common: &Common, args: Args) -> Result<()> {
    let dir = common.library()?;
    let stop = stop_on_signals()?;
    let progress = Progress::new();
    let options = Options { block: args.block, dry_run: args.dry_run, in_place: args.in_place };
    let repaired = repair(dir, &args.name, &options, &Work::on_all_cores(&stop, &progress))?;
    drop(progress);
    if common.json {
        print_json(&report(&args, &repaired))?;
    } else {
        print(&args, &repaired);
    }
    if args.dry_run { Ok(()) } else { judge(common, &args, &repaired) }
}

/// The error that says what is still bad, if anything is known to be.
fn judge(common: &Common, args: &Args, repaired: &Repaired) -> Result<()> {
    let mut incurable = repaired.blocks.iter().filter(|(_, cure)| cure.is_none()).map(|(block, _)| *block);
    let path = || {
        let library = Library::open(common.library()?)?;
        library.image(&args.name).map(|record| library.image_path(record))
    };
    if let Some(first) = incurable.next() {
        let cause = format!(
            "{} of {} bad blocks are not mended, for nobody else holds their contents (the first is block {first})",
            incurable.count() + 1,
            repaired.blocks.len()
        );
        let mend = format!(
            "copy the 4096 bytes at {} (and so on) from a backup of the file, or put the original back",
            u64::from(first) * BLOCK_SIZE
        );
        return Err(Error::file(ErrorKind::Changed, path()?, cause).mend(mend));
    }
    if args.block.is_none() && !repaired.good {
        let cause = "all blocks have their fingerprints again, yet the image is not what was added";
        return Err(Error::file(ErrorKind::Changed, path()?, cause).mend("put the original back"));
    }
    Ok(())
}

fn report(args: &Args, repaired: &Repaired) -> serde_json::Value {
    let line = |(block, cure): &(u32, Option<Cure>)| {
        let (how, image, from) = match cure {
            None => (None, None, None),
            Some(Cure::Zeros) => (Some("zeros"), None, None),
            Some(Cure::Copy { name, block, .. }) => (Some("copy"), Some(name), Some(block)),
        };
        serde_json::json!({
            "block": block,
            "offset": u64::from(*block) * BLOCK_SIZE,
            "cure": how,
            "image": image,
            "from_block": from,
            "repaired": cure.is_some() && !args.dry_run,
        })
    };
    serde_json::json!({
        "name": args.name,
        "dry_run": args.dry_run,
        "blocks": repaired.blocks.iter().map(line).collect::<Vec<_>>(),
        // Of a single block only the block is known, unless all was read again behind it.
        "good": repaired.good,
    })
}

fn print(args: &Args, repaired: &Repaired) {
    let name = &args.name;
    let verb = if args.dry_run { "can be" } else { "was" };
    for (block, cure) in &repaired.blocks {
        match cure {
            None => println!("{name}: block {block} is bad, and no other block has its content"),
            Some(Cure::Zeros) => println!("{name}: block {block} {verb} mended: zeros"),
            Some(Cure::Copy { name: from, block: at, .. }) => {
                println!("{name}: block {block} {verb} mended from block {at} of {from}");
            }
        }
    }
    match args.block {
        Some(block) if repaired.blocks.is_empty() => println!("{name}: block {block} is what was added"),
        _ if repaired.good => println!("{name}: good: every byte is what was added"),
        _ => {}
    }
}

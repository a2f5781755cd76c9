//! `vmar stats`: what the images have in common, and what the maps cost.

use super::Common;
use super::output::{Table, percent, print_json};
use crate::error::Result;
use crate::indexer::read_map;
use crate::indexer::stats::{Stats, indexed_clusters, mean_search_depths, stats};
use crate::library::Library;
use crate::units::{ImageId, human_bytes};
use serde::Serialize;

/// Arguments of `vmar stats`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What every two images have in common instead: for whoever decides which VMs run together
    #[arg(long)]
    matrix: bool,
    /// The clusters: which sets of images hold how many contents that no other image holds
    #[arg(long, conflicts_with = "matrix")]
    clusters: bool,
}

/// Runs the verb.
pub fn run(common: &Common, args: Args) -> Result<()> {
    crate::io::file::raise_open_files();
    let dir = common.library()?;
    if args.matrix {
        return super::matrix::run(common, &Library::open(dir)?);
    }
    if args.clusters {
        return print_clusters(common, &Library::consistently(dir, clusters)?);
    }
    let (library, stats) = Library::consistently(dir, |library| Ok((library.clone(), stats(library)?)))?;
    if common.json {
        return print_json(&stats);
    }
    print_table(&library, &stats)
}

/// A cluster, with the names of its images in order of ID.
#[derive(Debug, Serialize)]
struct Cluster {
    images: Vec<String>,
    contents: u64,
}

/// The clusters, the largest first.
fn clusters(library: &Library) -> Result<Vec<Cluster>> {
    let name = |id: &u32| library.image_by_id(ImageId(*id)).map(|r| r.name.clone());
    let named = |(ids, contents): (Vec<u32>, u64)| {
        Ok(Cluster { images: ids.iter().map(name).collect::<Result<_>>()?, contents })
    };
    let mut clusters: Vec<Cluster> = indexed_clusters(library)?.into_iter().map(named).collect::<Result<_>>()?;
    clusters.sort_by_key(|c| std::cmp::Reverse(c.contents));
    Ok(clusters)
}

fn print_clusters(common: &Common, clusters: &[Cluster]) -> Result<()> {
    if common.json {
        return print_json(&clusters);
    }
    let mut table = Table::new(&["images", "contents", ""], 1);
    for cluster in clusters {
        let size = human_bytes(cluster.contents * crate::units::BLOCK_SIZE);
        table.row(vec![cluster.images.join(", "), cluster.contents.to_string(), size]);
    }
    table.print();
    Ok(())
}

fn print_table(library: &Library, stats: &Stats) -> Result<()> {
    let head = ["name", "id", "blocks", "non-zero", "redirected", "", "entries", "blocks/entry", "map", "search depth"];
    let mut table = Table::new(&head, 1);
    for image in &stats.images {
        let [plain, depth] = mean_search_depths(&read_map(library, library.image(&image.name)?)?);
        table.row(vec![
            image.name.clone(),
            image.id.to_string(),
            image.blocks.to_string(),
            image.nonzero_blocks.to_string(),
            image.redirected_blocks.to_string(),
            percent(image.redirected_blocks, image.nonzero_blocks),
            image.entries.to_string(),
            format!("{:.1}", image.nonzero_blocks as f64 / (image.entries.max(1)) as f64),
            human_bytes(image.map_bytes),
            format!("{depth:.2} (plain {plain:.1})"),
        ]);
    }
    table.print();
    println!();
    println!("policy                      {}", library.catalog().policy);
    println!("non-zero blocks             {}", stats.nonzero_blocks);
    let unique_share = percent(stats.unique_blocks, stats.nonzero_blocks);
    println!("unique blocks               {} ({unique_share})", stats.unique_blocks);
    println!("clusters                    {}", stats.clusters);
    println!("content held at least twice {:.1}%", 100.0 * stats.duplicated_ge2);
    println!("  by at least two images    {:.1}%", 100.0 * stats.shared_ge2_images);
    println!("  by more than three images {:.1}%", 100.0 * stats.shared_gt3_images);
    Ok(())
}

//! A running host: what the servers of a library say of themselves. Whoever makes the report asks them
//! (`src/daemon/CONTROL.md`); here their answers become a table.

use super::{Cell, Part, Section, Table, ratio};
use crate::units::human_bytes;
use serde_json::Value;

/// First cell of the row with the sums.
pub const TOTAL: &str = "all";

/// A server that holds a lease.
#[derive(Clone, Debug)]
pub struct Server {
    /// The image that it serves, or the lease that makes no sense.
    pub image: String,
    /// Its process and host, or nothing.
    pub process: String,
    /// Its control socket, or nothing.
    pub socket: String,
    /// The value of `return` that it gave to 'statistics', or why there is none.
    pub answer: Result<Value, String>,
}

/// The columns: name, where it is in `total`, whether it is bytes.
const COLUMNS: [(&str, &str, bool); 13] = [
    ("reads", "/reads/operations", false),
    ("bytes read", "/reads/bytes", true),
    ("from its image", "/read_bytes_from/own_image", true),
    ("from other images", "/read_bytes_from/other_images", true),
    ("from the overlay", "/read_bytes_from/overlay", true),
    ("zeros", "/read_bytes_from/zeros", true),
    ("writes", "/writes/operations", false),
    ("bytes written", "/writes/bytes", true),
    ("flushes", "/flushes/operations", false),
    ("discards", "/discards/operations", false),
    ("write-zeroes", "/write_zeroes/operations", false),
    ("in flight", "/in_flight", false),
    ("retries", "/retries", false),
];

/// Of one server, or the sums of all.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Figures {
    values: [u64; COLUMNS.len()],
    errors: u64,
    /// Reads that did not end at once, and how long they took together.
    read_waits: u64,
    read_wait_ns: u64,
}

impl Figures {
    fn of(answer: &Value) -> Figures {
        let total = &answer["total"];
        let count = |at: &str| total.pointer(at).and_then(Value::as_u64).unwrap_or(0);
        let classes = total.as_object().into_iter().flatten().filter_map(|(_, class)| class.get("errors"));
        let waits = total.pointer("/reads/waits").and_then(Value::as_array).into_iter().flatten();
        Figures {
            values: COLUMNS.map(|(_, at, _)| count(at)),
            errors: classes.filter_map(Value::as_u64).fold(0, u64::saturating_add),
            read_waits: waits.filter_map(Value::as_u64).fold(0, u64::saturating_add),
            read_wait_ns: count("/reads/wait_ns"),
        }
    }

    fn add(&mut self, other: &Figures) {
        self.values.iter_mut().zip(other.values).for_each(|(sum, value)| *sum = sum.saturating_add(value));
        self.errors = self.errors.saturating_add(other.errors);
        self.read_waits = self.read_waits.saturating_add(other.read_waits);
        self.read_wait_ns = self.read_wait_ns.saturating_add(other.read_wait_ns);
    }

    fn value(&self, name: &str) -> u64 {
        COLUMNS.iter().zip(self.values).find(|((column, ..), _)| *column == name).map_or(0, |(_, value)| value)
    }

    fn row(&self, names: [&str; 3]) -> Vec<Cell> {
        let mut out: Vec<Cell> = names.map(Cell::text).to_vec();
        let (own, others) = (self.value("from its image"), self.value("from other images"));
        out.push(Cell::share(ratio(others, own.saturating_add(others))));
        let mean_us = ratio(self.read_wait_ns, self.read_waits) / 1000.0;
        out.push(Cell::share(ratio(self.read_waits, self.value("reads"))));
        out.push(Cell::number(mean_us, format!("{mean_us:.0} µs")));
        for ((_, _, is_bytes), value) in COLUMNS.iter().zip(self.values) {
            let text = if *is_bytes { human_bytes(value) } else { value.to_string() };
            out.push(Cell::number(value as f64, text));
        }
        out.push(Cell::number(self.errors as f64, self.errors.to_string()));
        out
    }
}

/// The section. Without servers it says so.
pub fn section(servers: &[Server]) -> Section {
    let mut sum = Figures::default();
    let mut rows = Vec::new();
    let mut silent = Vec::new();
    for server in servers {
        let names = [server.image.as_str(), &server.process, &server.socket];
        match &server.answer {
            Ok(answer) => {
                let figures = Figures::of(answer);
                sum.add(&figures);
                rows.push(figures.row(names));
            }
            Err(why) => silent.push(names.into_iter().chain([why.as_str()]).map(Cell::text).collect()),
        }
    }
    let (answered, asked) = (rows.len(), servers.len());
    if answered > 0 {
        rows.push(sum.row([TOTAL, &format!("{answered} servers"), ""]));
    }
    let names = ["image", "process", "control socket"].map(String::from);
    let first = ["shared reads", "reads that waited", "mean wait"].map(String::from);
    let others = COLUMNS.map(|(name, ..)| name.to_string());
    let head = names.iter().cloned().chain(first).chain(others).chain(["errors".to_string()]).collect();
    let caption = "Since each server started. Shared reads: of what was read from images, how much came from another image than \
                   the VM's own. Reads that waited: those that the page cache did not have at once.";
    let answers = Table { id: "host-servers".into(), caption: caption.into(), head, rows, rows_max: 0 };
    let head = names.into_iter().chain(["why it says nothing".to_string()]).collect();
    let caption = "Servers that did not answer.".to_string();
    let silent = Table { id: "host-silent".into(), caption, head, rows: silent, rows_max: 0 };
    let tables = [answers, silent].into_iter().filter(|t| !t.rows.is_empty()).map(Part::Table);
    let text = match asked {
        0 => "No server of this library runs.".to_string(),
        _ => format!("{answered} of {asked} servers of this library answered when this page was made."),
    };
    Section { title: "Running servers".into(), text, parts: tables.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn server(image: &str, answer: Result<Value, String>) -> Server {
        Server { image: image.into(), process: "1 on h".into(), socket: "/run/c".into(), answer }
    }

    fn answer(own: u64, others: u64) -> Value {
        json!({"total": {
            "reads": {"operations": 10, "bytes": own + others, "errors": 1, "waits": [1, 0, 1], "wait_ns": 4000},
            "writes": {"operations": 1, "bytes": 512, "errors": 2},
            "read_bytes_from": {"own_image": own, "other_images": others, "overlay": 0, "zeros": 0},
        }})
    }

    #[test]
    fn answers_are_summed_and_silence_is_told() {
        let servers = [
            server("a", Ok(answer(3000, 1000))),
            server("b", Ok(answer(0, 4000))),
            server("<c>", Err("does not answer".into())),
        ];
        let section = section(&servers);
        assert_eq!(section.text, "2 of 3 servers of this library answered when this page was made.");
        let [Part::Table(answers), Part::Table(silent)] = &section.parts[..] else { panic!("{:?}", section.parts) };
        assert_eq!(answers.rows.len(), 3);
        let last = &answers.rows[2];
        assert_eq!((&last[0], &last[3]), (&Cell::text(TOTAL), &Cell::number(0.625, "62.5%")));
        assert_eq!((&last[4], &last[5]), (&Cell::number(0.2, "20.0%"), &Cell::number(2.0, "2 µs")));
        assert_eq!(last.last(), Some(&Cell::number(6.0, "6")));
        assert_eq!(answers.head.len(), last.len());
        assert_eq!(silent.rows, [["<c>", "1 on h", "/run/c", "does not answer"].map(Cell::text)]);
    }

    #[test]
    fn strange_answers_are_zeros() {
        let section = section(&[server("a", Ok(json!({"total": {"reads": 7, "in_flight": "x"}})))]);
        assert!(matches!(&section.parts[..], [Part::Table(t)] if t.rows.len() == 2));
        assert!(super::section(&[]).parts.is_empty());
    }
}

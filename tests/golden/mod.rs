//! The hexdumps in the format specifications are the golden files: read here, compared byte for byte by the tests.

/// The bytes of the first block of a Markdown text that is fenced with "```hexdump", written by `hexdump -C`.
pub fn hexdump(markdown: &str) -> Vec<u8> {
    let start = markdown.find("```hexdump\n").expect("a hexdump") + "```hexdump\n".len();
    let mut bytes = Vec::new();
    for line in markdown[start..].lines().take_while(|line| !line.starts_with("```")) {
        let (offset, rest) = line.split_once("  ").expect("offset, two blanks, bytes");
        assert_eq!(usize::from_str_radix(offset, 16).expect("an offset"), bytes.len(), "{line}");
        let hex = rest.split('|').next().unwrap_or_default();
        bytes.extend(hex.split_whitespace().map(|b| u8::from_str_radix(b, 16).expect("a byte")));
    }
    bytes
}

/// Fails with the hexdump that the specification should show.
pub fn assert_golden(specification: &str, bytes: &[u8]) {
    assert!(hexdump(specification) == bytes, "the specification should show:\n{}", dump(bytes));
}

fn dump(bytes: &[u8]) -> String {
    let line = |(i, line): (usize, &[u8])| {
        let hex: String = line.iter().map(|b| format!(" {b:02x}")).collect();
        let text: String = line.iter().map(|&b| if (32..127).contains(&b) { b as char } else { '.' }).collect();
        format!("{:08x} {hex:48}  |{}|\n", 16 * i, text.replace('|', "."))
    };
    bytes.chunks(16).enumerate().map(line).collect()
}

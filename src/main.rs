//! The binary `vmar`.

fn main() -> std::process::ExitCode {
    vmar::cli::main()
}

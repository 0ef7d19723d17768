//! What the pre-filter costs: per packet in the kernel, beside nftables and ipset, and in the virtual machine; and
//! what loading and changing lists takes.
//!
//! `cargo xtask bench prefilter` runs the cases and prints the table. This program measures one of them and prints its
//! figures by name:
//!
//! ```text
//! drop xdp|nft|ipset ENTRIES    Linux, root
//! lists ENTRIES                 Linux, root
//! vm ENTRIES
//! ```
//!
//! *Drop* sends frames into one end of a virtual cable and has them dropped at the other, in network namespaces of its
//! own. The frames are never socket buffers on the way: the kernel makes them for a program that is run with
//! `BPF_F_TEST_XDP_LIVE_FRAMES`, which gives each another source address and redirects it into the cable. Sender and
//! receiver share one CPU, so that time per packet counts all work of both; what the sender takes alone, with the
//! same frames dropped where they are made, is subtracted. The lists, half /24 and half /32, are the same for all.
//! Addresses are random: from listed prefixes, from between them, and from far away.

#[cfg(target_os = "linux")]
mod drop;
#[cfg(target_os = "linux")]
mod generator;
mod lists;
mod vm;
#[cfg(target_os = "linux")]
#[allow(dead_code, reason = "tests use the rest")]
#[path = "../../tests/common/wire.rs"]
mod wire;

use std::process::ExitCode;

/// What was measured, by name.
type Figures = Vec<(String, f64)>;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    let Some(figures) = measure(&words) else {
        eprintln!("this measures one case at a time: run `cargo xtask bench prefilter`");
        return ExitCode::FAILURE;
    };
    for (name, figure) in figures {
        println!("{name} {figure}");
    }
    ExitCode::SUCCESS
}

fn measure(words: &[&str]) -> Option<Figures> {
    match *words {
        #[cfg(target_os = "linux")]
        ["drop", dropper, entries] => drop::measure(dropper.parse().ok()?, entries.parse().ok()?),
        #[cfg(target_os = "linux")]
        ["lists", entries] => Some(lists::measure(entries.parse().ok()?)),
        ["vm", entries] => Some(vm::measure(entries.parse().ok()?)),
        _ => None,
    }
}

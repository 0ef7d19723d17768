//! Translates the committed bytecode into Rust, so that the simulator runs it at the speed of compiled code.
//!
//! No BPF toolchain is needed: the object is only read.

#[path = "../src/object.rs"]
#[allow(dead_code, unreachable_pub, reason = "the crate uses the rest")]
mod object;
mod translate;

use std::path::Path;
use std::{env, fs};

use crate::object::{OBJECT, Program};

fn main() {
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=src/object.rs");
    println!("cargo::rerun-if-changed=../program/tungate.bpf.o");
    let translated = Program::parse(OBJECT).and_then(|program| translate::translate(&program));
    let translated = translated.unwrap_or_else(|error| {
        println!("cargo::error=bpf/program/tungate.bpf.o cannot be used: {error}");
        std::process::exit(1);
    });
    let directory = env::var_os("OUT_DIR").expect("cargo names the directory");
    fs::write(Path::new(&directory).join("bytecode.rs"), translated)
        .expect("the directory can be written to");
}

//! `cargo xtask bpf`: builds the XDP program, or checks that the committed object is what its source gives.
//!
//! The program is built by a Rust compiler with the library's source beside it, for a target without a prebuilt
//! library, and linked by bpf-linker. Debian has both in packages:
//!
//! ```text
//! apt-get install --no-install-recommends rustc-web rust-web-src cargo-web llvm-22-dev llvm-22 clang-22 libpolly-22-dev
//! LLVM_PREFIX=$(llvm-config-22 --prefix) \
//!     cargo install bpf-linker@0.13.0 --locked --no-default-features --features llvm-22
//! ```
//!
//! A rustup toolchain with the component `rust-src` will do as well. Different compilers of about the same age give
//! the same code, while names, their order and debug data differ from place to place. So a check compares what a
//! loader makes of the object: the linked code, with the maps it refers to, and the maps' definitions.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use aya_obj::{Map, Object};
use object::read::elf::ElfFile64;
use object::{LittleEndian, Object as _, ObjectSection as _};

use crate::workspace::Workspace;

/// The committed object, from the workspace's root.
const OBJECT: &str = "bpf/program/tungate.bpf.o";
/// SHA-256 of the object and of all it is made of, as `sha256sum --check` reads it: tells whether anything has changed
/// since the object was built, without building it.
const SUMS: &str = "bpf/program/tungate.bpf.o.sha256";
/// Folders and files the object is made of.
const SOURCES: [&str; 5] = [
    "bpf/abi/Cargo.toml",
    "bpf/abi/src",
    "bpf/program/Cargo.lock",
    "bpf/program/Cargo.toml",
    "bpf/program/src",
];
const TARGET: &str = "bpfel-unknown-none";
const LINKER: &str = "bpf-linker";
/// `v3` has 32-bit operations and is understood by every kernel with ring buffers.
const FLAGS: &str = "-Clinker=bpf-linker -Ctarget-cpu=v3 -Cdebuginfo=2 -Clink-arg=--btf \
                     --cfg=bpf_target_arch=\"x86_64\"";

/// Builds the object and writes it to its place, or, with `check`, compares it with what is there.
pub(crate) fn run(workspace: &Workspace, check: bool) -> Result<ExitCode> {
    if check {
        return Ok(match compare(workspace)? {
            Compared::Same => ExitCode::SUCCESS,
            Compared::Skipped(why) => {
                println!("bpf: skipped: {why}");
                ExitCode::SUCCESS
            }
            Compared::Different => ExitCode::FAILURE,
        });
    }
    let built = Toolchain::find()?.build(workspace)?;
    fs::write(workspace.root.join(OBJECT), &built).with_context(|| format!("cannot write {OBJECT}"))?;
    write_sums(workspace)?;
    println!(
        "bpf: {OBJECT}: {} bytes, {} instructions",
        built.len(),
        Code::read(&built)?.instructions.len()
    );
    Ok(ExitCode::SUCCESS)
}

/// What a comparison of the committed object with its source came to.
pub(crate) enum Compared {
    Same,
    /// What differs has been printed.
    Different,
    /// There was none, for this reason.
    Skipped(String),
}

fn compare(workspace: &Workspace) -> Result<Compared> {
    let toolchain = match Toolchain::find() {
        Ok(toolchain) => toolchain,
        Err(missing) => {
            let why = format!("{missing}; the XDP program's object was not compared with its source");
            return Ok(Compared::Skipped(why));
        }
    };
    let built = toolchain.build(workspace)?;
    let committed = fs::read(workspace.root.join(OBJECT)).with_context(|| format!("cannot read {OBJECT}"))?;
    let differences = Code::read(&committed)?.differences(&Code::read(&built)?);
    if differences.is_empty() {
        println!("bpf: {OBJECT} is what its source gives");
        return Ok(Compared::Same);
    }
    eprintln!(
        "bpf: {OBJECT} is not what its source gives: {}",
        differences.join(", ")
    );
    eprintln!("hint: `cargo xtask bpf` builds it anew; commit the result with the source");
    Ok(Compared::Different)
}

/// Compares the committed object with what its source gives, if either has changed since it was built.
pub(crate) fn compare_if_changed(workspace: &Workspace) -> Result<Compared> {
    let status = Command::new("sha256sum")
        .args(["--check", "--strict", "--status", SUMS])
        .current_dir(&workspace.root)
        .stderr(Stdio::null())
        .status()
        .context("cannot run sha256sum")?;
    if status.success() {
        return Ok(Compared::Skipped(
            "the XDP program's object was not compared with its source, since neither has changed".to_owned(),
        ));
    }
    compare(workspace)
}

fn write_sums(workspace: &Workspace) -> Result<()> {
    let output = Command::new("sh")
        .arg("-c")
        .arg(r#"find "$@" -type f | LC_ALL=C sort | xargs sha256sum"#)
        .arg("sh")
        .arg(OBJECT)
        .args(SOURCES)
        .current_dir(&workspace.root)
        .output()
        .context("cannot run sh")?;
    ensure!(output.status.success(), "sha256sum: {}", output.status);
    fs::write(workspace.root.join(SUMS), output.stdout).with_context(|| format!("cannot write {SUMS}"))
}

/// A compiler that comes with its library's source, and the linker.
struct Toolchain {
    cargo: Vec<String>,
    rustc: PathBuf,
}

impl Toolchain {
    fn find() -> Result<Self> {
        let linker = Command::new(LINKER)
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        ensure!(
            linker.is_ok_and(|status| status.success()),
            "{LINKER} is not installed"
        );
        let plain = |path: &str| (vec![path.to_owned()], "/usr/bin/rustc".to_owned());
        let rustup = |toolchain: &str| {
            let cargo = ["rustup", "run", toolchain, "cargo"].map(str::to_owned).to_vec();
            let which = Command::new("rustup")
                .args(["which", "rustc", "--toolchain", toolchain])
                .output();
            let rustc = which.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
            (cargo, rustc.unwrap_or_default())
        };
        for (cargo, rustc) in [plain("/usr/bin/cargo"), rustup("nightly"), rustup("stable")] {
            let sysroot = Command::new(&rustc)
                .args(["--print", "sysroot"])
                .env_remove("RUSTUP_TOOLCHAIN")
                .output();
            let Ok(sysroot) = sysroot else { continue };
            let sysroot = PathBuf::from(String::from_utf8_lossy(&sysroot.stdout).trim());
            if sysroot.join("lib/rustlib/src/rust/library/core").is_dir() {
                return Ok(Self {
                    cargo,
                    rustc: rustc.into(),
                });
            }
        }
        bail!("no Rust compiler with its library's source is installed")
    }

    /// Builds the program; returns the object without debug data.
    fn build(&self, workspace: &Workspace) -> Result<Vec<u8>> {
        let target = workspace.target.join("bpf");
        let status = Command::new(&self.cargo[0])
            .args(&self.cargo[1..])
            .args([
                "build",
                "--quiet",
                "--locked",
                "--release",
                "--target",
                TARGET,
                "-Zbuild-std=core",
            ])
            .arg("--target-dir")
            .arg(&target)
            .current_dir(workspace.root.join("bpf/program"))
            .env("RUSTC", &self.rustc)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTFLAGS", FLAGS)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env_remove("CARGO")
            .env_remove("RUSTUP_TOOLCHAIN")
            .status()
            .with_context(|| format!("cannot run {}", self.cargo[0]))?;
        ensure!(status.success(), "the XDP program does not build: {status}");
        strip(&target.join(TARGET).join("release/tungate"))
    }
}

/// Takes out debug data, which would hold this machine's paths, and of the type data all but the types.
fn strip(linked: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(linked).with_context(|| format!("cannot read {}", linked.display()))?;
    let file = ElfFile64::<LittleEndian>::parse(&*bytes)?;
    let section = file
        .section_by_name(".BTF")
        .context("the object has no type data")?;
    let types = without_unused_names(section.data()?)?;
    let types_file = linked.with_extension("btf");
    let stripped = linked.with_extension("bpf.o");
    fs::write(&types_file, types)?;
    let status = objcopy()?
        .args([
            "--strip-debug",
            "--remove-section=.BTF.ext",
            "--remove-section=.rel.BTF.ext",
        ])
        // Loaders find maps by their symbols.
        .arg("--remove-section=.rel.BTF")
        .arg(format!("--update-section=.BTF={}", types_file.display()))
        .arg(linked)
        .arg(&stripped)
        .status()?;
    ensure!(status.success(), "llvm-objcopy: {status}");
    Ok(fs::read(&stripped)?)
}

fn objcopy() -> Result<Command> {
    ["llvm-objcopy-22", "llvm-objcopy"]
        .into_iter()
        .find(|name| {
            Command::new(name)
                .arg("--version")
                .stdout(Stdio::null())
                .status()
                .is_ok()
        })
        .map(Command::new)
        .context("llvm-objcopy is not installed")
}

/// Rewrites BTF with the names of its types only: lines of source and their files' paths go.
///
/// The format is in the kernel's documentation (bpf/btf): a header, types, and the names they refer to by offset.
fn without_unused_names(btf: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| -> Result<u32> {
        let bytes = btf.get(at..at + 4).context("the type data is cut")?;
        Ok(u32::from_le_bytes(bytes.try_into()?))
    };
    let header = word(4)? as usize;
    let (types_at, types_length) = (header + word(8)? as usize, word(12)? as usize);
    let names_at = header + word(16)? as usize;
    let mut types = btf
        .get(types_at..types_at + types_length)
        .context("the type data is cut")?
        .to_vec();
    let mut names = vec![0u8];
    let mut moved = BTreeMap::from([(0, 0)]);
    let mut rename = |types: &mut [u8], at: usize| -> Result<()> {
        let old = u32::from_le_bytes(types[at..at + 4].try_into()?);
        let new = *moved.entry(old).or_insert_with(|| {
            let name = btf[names_at + old as usize..]
                .split(|&byte| byte == 0)
                .next()
                .unwrap_or_default();
            let new = names.len() as u32;
            names.extend_from_slice(name);
            names.push(0);
            new
        });
        types[at..at + 4].copy_from_slice(&new.to_le_bytes());
        Ok(())
    };
    let mut at = 0;
    while at < types.len() {
        rename(&mut types, at)?;
        let info = u32::from_le_bytes(types[at + 4..at + 8].try_into()?);
        let (kind, count) = ((info >> 24) & 0x1f, (info & 0xffff) as usize);
        at += 12;
        // Kind, by number: size of what follows, as a whole and per element, and whether elements have names.
        let (fixed, each, named) = match kind {
            1 | 14 | 17 => (4, 0, false),          // INT, VAR, DECL_TAG
            2 | 7..=12 | 16 | 18 => (0, 0, false), // PTR, FWD, TYPEDEF, qualifiers, FUNC, FLOAT, TYPE_TAG
            3 => (12, 0, false),                   // ARRAY
            4 | 5 | 19 => (0, 12, true),           // STRUCT, UNION, ENUM64
            6 | 13 => (0, 8, true),                // ENUM, FUNC_PROTO
            15 => (0, 12, false),                  // DATASEC
            _ => bail!("the type data has a kind {kind}, which is not known"),
        };
        at += fixed;
        for _ in 0..count * usize::from(each > 0) {
            if named {
                rename(&mut types, at)?;
            }
            at += each;
        }
    }
    let mut result = btf[..header].to_vec();
    result[8..12].copy_from_slice(&0u32.to_le_bytes());
    result[16..20].copy_from_slice(&(types_length as u32).to_le_bytes());
    result[20..24].copy_from_slice(&(names.len() as u32).to_le_bytes());
    result.extend(types);
    result.extend(names);
    Ok(result)
}

/// What has to agree: what a loader would hand to the kernel.
struct Code {
    /// The program with the functions it calls, in the order of the first calls, and with the numbers of maps in
    /// place of references to them.
    instructions: Vec<[u8; 8]>,
    /// By name: type, key and value size, elements, flags; and the same of what a map of maps holds.
    maps: BTreeMap<String, Vec<[u32; 5]>>,
}

impl Code {
    fn read(object: &[u8]) -> Result<Self> {
        let mut object = Object::parse(object).context("cannot parse the object")?;
        let maps: BTreeMap<_, _> = object
            .maps
            .iter()
            .map(|(name, map)| (name.clone(), map.clone()))
            .collect();
        let text: HashSet<usize> = object.functions.keys().map(|&(section, _)| section).collect();
        let numbered = maps
            .iter()
            .zip(0..)
            .map(|((name, map), number)| (name.as_str(), number, map));
        object.relocate_maps(numbered, &text)?;
        object.relocate_calls(&text)?;
        let program = object
            .programs
            .values()
            .next()
            .context("the object has no program")?;
        let function = object
            .functions
            .get(&program.function_key())
            .context("the program has no code")?;
        let instructions = function.instructions.iter().map(|instruction| {
            let [offset_low, offset_high] = instruction.off.to_le_bytes();
            let [a, b, c, d] = instruction.imm.to_le_bytes();
            let registers = instruction.dst_reg() | instruction.src_reg() << 4;
            [instruction.code, registers, offset_low, offset_high, a, b, c, d]
        });
        let shape = |map: &Map| {
            [
                map.map_type(),
                map.key_size(),
                map.value_size(),
                map.max_entries(),
                map.map_flags(),
            ]
        };
        Ok(Self {
            instructions: instructions.collect(),
            maps: maps
                .iter()
                .map(|(name, map)| {
                    let shapes = [Some(shape(map)), map.inner().as_ref().map(shape)];
                    (name.clone(), shapes.into_iter().flatten().collect())
                })
                .collect(),
        })
    }

    fn differences(&self, other: &Self) -> Vec<&'static str> {
        let differs = [
            ("its code", self.instructions != other.instructions),
            ("its maps", self.maps != other.maps),
        ];
        differs
            .into_iter()
            .filter_map(|(what, differs)| differs.then_some(what))
            .collect()
    }
}

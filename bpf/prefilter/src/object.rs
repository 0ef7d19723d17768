//! The committed object: parsed, relocated, and checked against the layouts this crate writes.

use std::collections::HashSet;

use aya_obj::generated::{bpf_insn, bpf_map_type};
use aya_obj::maps::Map;
use aya_obj::relocation::EbpfRelocationError;
use aya_obj::{Object, ParseError};
use tungate_bpf_abi::map;

/// The program as `cargo xtask bpf` built it.
pub const OBJECT: &[u8] = &BYTES.0;

/// Readers of ELF files want 8-byte alignment, which `include_bytes` does not promise.
#[repr(C, align(8))]
struct Aligned<const N: usize>([u8; N]);

static BYTES: Aligned<{ include_bytes!("../../program/tungate.bpf.o").len() }> =
    Aligned(*include_bytes!("../../program/tungate.bpf.o"));

/// Name of the program in the object.
pub const PROGRAM: &str = "tungate";

/// Why an object cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// No ELF file with BPF in it.
    #[error("it cannot be parsed: {0}")]
    Parse(#[from] ParseError),
    /// A reference to a map or function leads nowhere.
    #[error("it cannot be relocated: {0}")]
    Relocation(#[from] EbpfRelocationError),
    /// The program is missing.
    #[error("it has no program `{PROGRAM}`")]
    NoProgram,
    /// A map is missing, or is one that the loaders do not know.
    #[error("its maps are {found:?}, not {expected:?}")]
    Maps {
        /// Names of the maps in the object.
        found: Vec<String>,
        /// Names the loaders know.
        expected: Vec<&'static str>,
    },
    /// A map of a type or with sizes the virtual machine does not know.
    #[error("map {name} is of an unknown kind")]
    MapKind {
        /// Name of the map.
        name: String,
    },
    /// An instruction the translation does not know.
    #[error("instruction {index} (code {code:#04x}) is not supported")]
    Instruction {
        /// Index of the instruction.
        index: usize,
        /// Its operation code.
        code: u8,
    },
    /// A jump out of the program.
    #[error("instruction {index} jumps out of the program")]
    Jump {
        /// Index of the instruction.
        index: usize,
    },
    /// A helper that could make a run depend on more than packet and lists.
    #[error("instruction {index} calls helper {helper}, which is not allowed")]
    Helper {
        /// Index of the instruction.
        index: usize,
        /// Number of the helper.
        helper: i32,
    },
}

/// The program's code, with indices into `maps` in place of addresses.
#[derive(Debug, Clone)]
pub struct Program {
    /// Instructions; functions that are called follow the program itself.
    pub code: Vec<bpf_insn>,
    /// Maps by the index under which the code knows them: in the order of [`MAPS`].
    pub maps: Vec<MapDefinition>,
}

/// Names of all maps.
pub const MAPS: [&str; 9] = [
    map::ACTIVE,
    map::SETTINGS,
    map::GROUPS4,
    map::GROUPS6,
    map::CELLS,
    map::LOCAL,
    map::REASONS,
    map::RULES,
    map::EVENTS,
];

/// Indices of maps in [`MAPS`].
pub(crate) mod index {
    pub(crate) const ACTIVE: usize = 0;
    pub(crate) const SETTINGS: usize = 1;
    pub(crate) const GROUPS4: usize = 2;
    pub(crate) const GROUPS6: usize = 3;
    pub(crate) const CELLS: usize = 4;
    pub(crate) const LOCAL: usize = 5;
    pub(crate) const REASONS: usize = 6;
    pub(crate) const RULES: usize = 7;
}

/// A map as the object defines it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapDefinition {
    /// Name.
    pub name: String,
    /// What it is and how large.
    pub shape: MapShape,
    /// What a map of maps holds.
    pub inner: Option<MapShape>,
}

/// Type and sizes of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapShape {
    /// Number of the type, as in the kernel's interface.
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Number of elements, or bytes of a ring buffer.
    pub max_entries: u32,
    /// Flags.
    pub flags: u32,
}

impl MapShape {
    fn new(map: &Map) -> Self {
        // The definition of a ring buffer names its records' type; the kernel wants no value size.
        let is_ring = map.map_type() == bpf_map_type::BPF_MAP_TYPE_RINGBUF as u32;
        Self {
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: if is_ring { 0 } else { map.value_size() },
            max_entries: map.max_entries(),
            flags: map.map_flags(),
        }
    }
}

impl Program {
    /// Parses and relocates `object`.
    ///
    /// # Errors
    ///
    /// [`ObjectError`] for everything that is not this program.
    pub fn parse(object: &[u8]) -> Result<Self, ObjectError> {
        let mut object = Object::parse(object)?;
        let mut found: Vec<String> = object.maps.keys().cloned().collect();
        found.sort_unstable();
        let mut expected = MAPS.to_vec();
        expected.sort_unstable();
        if found != expected {
            return Err(ObjectError::Maps { found, expected });
        }
        let maps: Vec<(&str, Map)> = MAPS
            .iter()
            .map(|&name| (name, object.maps[name].clone()))
            .collect();
        let text: HashSet<usize> = object.functions.keys().map(|&(section, _)| section).collect();
        object.relocate_maps(
            maps.iter()
                .enumerate()
                .map(|(index, &(name, ref map))| (name, index as i32, map)),
            &text,
        )?;
        object.relocate_calls(&text)?;
        let program = object.programs.get(PROGRAM).ok_or(ObjectError::NoProgram)?;
        let function = object
            .functions
            .get(&program.function_key())
            .ok_or(ObjectError::NoProgram)?;
        Ok(Self {
            code: function.instructions.clone(),
            maps: maps
                .into_iter()
                .map(|(name, map)| MapDefinition {
                    name: name.to_owned(),
                    shape: MapShape::new(&map),
                    inner: map.inner().map(|inner| MapShape::new(&inner)),
                })
                .collect(),
        })
    }
}

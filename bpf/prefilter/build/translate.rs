//! From bytecode to Rust, function by function.
//!
//! # Theory of operation
//!
//! Every function of the program becomes a Rust function, whose variables are the registers. Every access to memory
//! becomes a call of the machine's `Memory`, which checks it. The instruction set is BPF's up to version 3, without
//! atomics (RFC 9669).
//!
//! Jumps become breaks out of labelled blocks. For that, a function's basic blocks are put in an order in which
//! every jump leads forward: then a jump to a block is a break out of everything that ends right before it. Only
//! loops lead back: blocks that can reach one another are taken together, put into a `loop`, and ordered among
//! themselves without the jumps to the first of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use aya_obj::generated::bpf_insn;

use crate::object::{ObjectError, Program};

/// Bytes of stack for each function.
const FRAME: i64 = 512;

const FRAME_POINTER: u8 = 10;

const LOAD_CONSTANT: u8 = 0x18;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// Translates the program, which starts at the first instruction.
///
/// # Errors
///
/// [`ObjectError`] for an instruction, jump or helper that is not known.
pub(crate) fn translate(program: &Program) -> Result<String, ObjectError> {
    let code = &program.code;
    let mut starts = BTreeSet::from([0]);
    for (index, instruction) in code.iter().enumerate() {
        if is_local_call(instruction) {
            starts.insert(target(code, index, instruction.imm)?);
        }
    }
    let ends = starts.iter().copied().skip(1).chain([code.len()]);
    let functions: BTreeMap<usize, usize> = starts.iter().copied().zip(ends).collect();
    let mut depths = BTreeMap::new();
    measure(code, &functions, 0, 0, &mut depths)?;

    let mut out = String::new();
    for (&start, &end) in &functions {
        // A function nobody calls is not linked in.
        let Some(&depth) = depths.get(&start) else {
            continue;
        };
        Function {
            code,
            maps: program.maps.len(),
            start,
            end,
            depth,
        }
        .write(&mut out)?;
    }
    Ok(out)
}

/// Finds out how deep in calls a function can be: its frame lies below those of all its callers.
fn measure(
    code: &[bpf_insn],
    functions: &BTreeMap<usize, usize>,
    start: usize,
    depth: usize,
    depths: &mut BTreeMap<usize, usize>,
) -> Result<(), ObjectError> {
    // As in the kernel.
    const MAX_DEPTH: usize = 8;
    if depth >= MAX_DEPTH {
        return Err(ObjectError::Jump { index: start });
    }
    let known = depths.entry(start).or_insert(0);
    *known = depth.max(*known);
    for index in start..functions[&start] {
        if is_local_call(&code[index]) {
            measure(
                code,
                functions,
                target(code, index, code[index].imm)?,
                depth + 1,
                depths,
            )?;
        }
    }
    Ok(())
}

fn is_local_call(instruction: &bpf_insn) -> bool {
    instruction.code == CALL && instruction.src_reg() == 1
}

/// Where a jump over `distance` instructions leads.
fn target(code: &[bpf_insn], index: usize, distance: i32) -> Result<usize, ObjectError> {
    usize::try_from(index as i64 + 1 + i64::from(distance))
        .ok()
        .filter(|&target| target < code.len())
        // The second half of a constant is no instruction.
        .filter(|&target| target == 0 || code[target - 1].code != LOAD_CONSTANT)
        .ok_or(ObjectError::Jump { index })
}

/// One function of the program: the instructions from `start` to before `end`.
struct Function<'a> {
    code: &'a [bpf_insn],
    maps: usize,
    start: usize,
    end: usize,
    /// Number of frames above its own.
    depth: usize,
}

/// A run of instructions entered at the first and left at the last.
struct Block {
    /// Behind the last instruction.
    end: usize,
    /// Blocks that may come next.
    successors: Vec<usize>,
}

impl Function<'_> {
    fn write(&self, out: &mut String) -> Result<(), ObjectError> {
        let blocks = self.blocks()?;
        let name = self.start;
        let _ = writeln!(
            out,
            "#[inline(never)]\n\
             pub(super) fn function_{name}(memory: &mut Memory, packet: &[u8], arguments: [u64; 5]) -> Result<u64, Fault> {{\n\
             let [mut r1, mut r2, mut r3, mut r4, mut r5] = arguments;\n\
             let (mut r0, mut r6, mut r7, mut r8, mut r9) = (0u64, 0u64, 0u64, 0u64, 0u64);\n\
             const r10: u64 = Memory::frame_pointer({depth});",
            depth = self.depth
        );
        let all = blocks.keys().copied().collect();
        self.write_sequence(&blocks, &all, self.start, &[], out)?;
        out.push_str("}\n");
        Ok(())
    }

    /// Finds the basic blocks, by their first instruction.
    fn blocks(&self) -> Result<BTreeMap<usize, Block>, ObjectError> {
        let mut leaders = BTreeSet::from([self.start]);
        for index in self.indices() {
            let jump = self.jump(index)?;
            if jump.is_some() || self.code[index].code == EXIT {
                leaders.extend(jump);
                leaders.insert(index + 1);
            }
        }
        leaders.remove(&self.end);
        let ends = leaders.iter().copied().skip(1).chain([self.end]);
        let mut blocks = BTreeMap::new();
        for (start, end) in leaders.iter().copied().zip(ends) {
            let last = self
                .indices()
                .take_while(|&index| index < end)
                .last()
                .unwrap_or(start);
            let instruction = &self.code[last];
            let mut successors: Vec<usize> = self.jump(last)?.into_iter().collect();
            let goes_on = instruction.code != EXIT && !is_goto(instruction);
            if goes_on && end == self.end {
                return Err(ObjectError::Jump { index: last });
            }
            successors.extend(goes_on.then_some(end));
            blocks.insert(start, Block { end, successors });
        }
        Ok(blocks)
    }

    /// Indices of instructions: a constant has two slots.
    fn indices(&self) -> impl Iterator<Item = usize> {
        let mut next = self.start;
        std::iter::from_fn(move || {
            let index = next;
            next += if self.code.get(index)?.code == LOAD_CONSTANT {
                2
            } else {
                1
            };
            (index < self.end).then_some(index)
        })
    }

    /// Where the instruction jumps to, if it may jump.
    fn jump(&self, index: usize) -> Result<Option<usize>, ObjectError> {
        let instruction = &self.code[index];
        let is_jump =
            matches!(instruction.code & 0x07, 0x05 | 0x06) && !matches!(instruction.code, CALL | EXIT);
        if !is_jump {
            return Ok(None);
        }
        let distance = if instruction.code == 0x06 {
            instruction.imm
        } else {
            i32::from(instruction.off)
        };
        let target = target(self.code, index, distance)?;
        let is_inside = (self.start..self.end).contains(&target);
        is_inside
            .then_some(Some(target))
            .ok_or(ObjectError::Jump { index })
    }

    /// Writes the blocks of `part`, which is entered at `entry`. It lies in loops whose first blocks are `heads`, the
    /// innermost last; jumps to these lead back.
    fn write_sequence(
        &self,
        blocks: &BTreeMap<usize, Block>,
        part: &BTreeSet<usize>,
        entry: usize,
        heads: &[usize],
        out: &mut String,
    ) -> Result<(), ObjectError> {
        let components = components(blocks, part, entry, heads);
        // Outermost is the label of the last component.
        for component in components.iter().skip(1).rev() {
            let _ = writeln!(out, "'b{}: {{", self.entry(blocks, part, component)?);
        }
        for (position, component) in components.iter().enumerate() {
            if position > 0 {
                out.push_str("}\n");
            }
            let first = if position == 0 {
                entry
            } else {
                self.entry(blocks, part, component)?
            };
            let block = &blocks[&first];
            let is_loop = component.len() > 1 || block.successors.contains(&first);
            if is_loop && !heads.contains(&first) {
                let _ = writeln!(out, "'l{first}: loop {{\nmemory.spend()?;");
                self.write_sequence(blocks, component, first, &[heads, &[first]].concat(), out)?;
                out.push_str("}\n");
            } else {
                self.write_block(first, block, heads, out)?;
            }
        }
        Ok(())
    }

    /// The block by which a component is entered.
    fn entry(
        &self,
        blocks: &BTreeMap<usize, Block>,
        part: &BTreeSet<usize>,
        component: &BTreeSet<usize>,
    ) -> Result<usize, ObjectError> {
        let outside = part
            .difference(component)
            .flat_map(|block| &blocks[block].successors);
        let entries: BTreeSet<usize> = outside
            .copied()
            .filter(|block| component.contains(block))
            .collect();
        match entries.into_iter().collect::<Vec<_>>()[..] {
            [entry] => Ok(entry),
            // A loop with two entries, which compilers do not make.
            _ => Err(ObjectError::Jump {
                index: *component.first().unwrap_or(&self.start),
            }),
        }
    }

    fn write_block(
        &self,
        start: usize,
        block: &Block,
        heads: &[usize],
        out: &mut String,
    ) -> Result<(), ObjectError> {
        let go = |to: usize| {
            if heads.contains(&to) {
                format!("continue 'l{to};")
            } else {
                format!("break 'b{to};")
            }
        };
        let mut ended = false;
        for index in self.indices().filter(|index| (start..block.end).contains(index)) {
            let instruction = &self.code[index];
            let unknown = || ObjectError::Instruction {
                index,
                code: instruction.code,
            };
            match self.jump(index)? {
                Some(to) if is_goto(instruction) => {
                    ended = true;
                    let _ = writeln!(out, "{}", go(to));
                }
                Some(to) => {
                    let condition = condition(instruction).ok_or_else(unknown)?;
                    let _ = writeln!(out, "if {condition} {{ {} }}", go(to));
                }
                None if instruction.code == EXIT => {
                    ended = true;
                    out.push_str("return Ok(r0);\n");
                }
                None if instruction.code == CALL => {
                    let _ = writeln!(out, "r0 = {}?;", self.call(index)?);
                }
                None => {
                    let statement = self.statement(index).ok_or_else(unknown)?;
                    let _ = writeln!(out, "{statement};");
                }
            }
        }
        if !ended {
            let _ = writeln!(out, "{}", go(block.end));
        }
        Ok(())
    }

    /// A call of a helper, or of another function.
    fn call(&self, index: usize) -> Result<String, ObjectError> {
        let instruction = &self.code[index];
        if is_local_call(instruction) {
            let function = target(self.code, index, instruction.imm)?;
            return Ok(format!(
                "function_{function}(memory, packet, [r1, r2, r3, r4, r5])"
            ));
        }
        match instruction.imm {
            1 => Ok("memory.lookup(packet, r1, r2)".to_owned()),
            131 => Ok("memory.reserve(r1, r2)".to_owned()),
            132 => Ok("memory.submit(r1)".to_owned()),
            helper => Err(ObjectError::Helper { index, helper }),
        }
    }

    /// An instruction that neither jumps nor calls; `None` for one that is not known.
    fn statement(&self, index: usize) -> Option<String> {
        let instruction = &self.code[index];
        let bpf_insn {
            code,
            off: offset,
            imm,
            ..
        } = *instruction;
        let (dst, src) = (instruction.dst_reg(), instruction.src_reg());
        if dst > FRAME_POINTER || src > FRAME_POINTER {
            return None;
        }
        // Stores have an address in `dst`; all else writes to it.
        let is_store = matches!(code & 0x07, 0x02 | 0x03);
        if !is_store && dst == FRAME_POINTER {
            return None;
        }
        let size = match code & 0x18 {
            0x00 => 32,
            0x08 => 16,
            0x10 => 8,
            _ => 64,
        };
        match code {
            LOAD_CONSTANT => {
                let upper = self.code.get(index + 1)?.imm;
                match src {
                    0 => Some(format!(
                        "r{dst} = {:#x}",
                        u64::from(imm as u32) | u64::from(upper as u32) << 32
                    )),
                    1 if usize::try_from(imm).is_ok_and(|map| map < self.maps) => {
                        Some(format!("r{dst} = Memory::handle({imm})"))
                    }
                    _ => None,
                }
            }
            // Loads, and stores of registers and of constants, by size.
            0x61 | 0x69 | 0x71 | 0x79 => {
                let address = address(src, offset)?;
                Some(format!(
                    "r{dst} = u64::from(u{size}::from_le_bytes(memory.load(packet, {address})?))"
                ))
            }
            0x63 | 0x6b | 0x73 | 0x7b => {
                let address = address(dst, offset)?;
                Some(format!(
                    "memory.store({address}, (r{src} as u{size}).to_le_bytes())?"
                ))
            }
            0x62 | 0x6a | 0x72 | 0x7a => {
                let address = address(dst, offset)?;
                Some(format!(
                    "memory.store({address}, ({imm}i64 as u{size}).to_le_bytes())?"
                ))
            }
            0x87 => Some(format!("r{dst} = r{dst}.wrapping_neg()")),
            0x84 => Some(format!("r{dst} = u64::from((r{dst} as u32).wrapping_neg())")),
            // To big-endian by swapping, to little-endian by cutting: the machine is little-endian.
            0xdc if matches!(imm, 16 | 32 | 64) => {
                Some(format!("r{dst} = u64::from((r{dst} as u{imm}).swap_bytes())"))
            }
            0xd4 if matches!(imm, 16 | 32 | 64) => Some(format!("r{dst} = u64::from(r{dst} as u{imm})")),
            // Version 4 gives the offset a meaning here.
            _ if matches!(code & 0x07, 0x04 | 0x07) && offset == 0 => {
                let (a, b) = operands(instruction, code & 0x07 == 0x07);
                let result = arithmetic(code & 0xf0, &a, &b)?;
                Some(format!("r{dst} = u64::from({result})"))
            }
            _ => None,
        }
    }
}

fn is_goto(instruction: &bpf_insn) -> bool {
    matches!(instruction.code, 0x05 | 0x06)
}

/// The address `offset` bytes from a register's. In the frame, only what lies in it is an address at all.
fn address(register: u8, offset: i16) -> Option<String> {
    if register == FRAME_POINTER && !(-FRAME..0).contains(&i64::from(offset)) {
        return None;
    }
    Some(format!("r{register}.wrapping_add({offset}i64 as u64)"))
}

/// First and second operand, 64 or 32 bits wide.
fn operands(instruction: &bpf_insn, is_wide: bool) -> (String, String) {
    let (dst, src) = (instruction.dst_reg(), instruction.src_reg());
    let is_register = instruction.code & 0x08 != 0;
    match (is_wide, is_register) {
        (true, true) => (format!("r{dst}"), format!("r{src}")),
        (true, false) => (format!("r{dst}"), format!("{:#x}u64", instruction.imm as u64)),
        (false, true) => (format!("(r{dst} as u32)"), format!("(r{src} as u32)")),
        (false, false) => (
            format!("(r{dst} as u32)"),
            format!("{:#x}u32", instruction.imm as u32),
        ),
    }
}

fn arithmetic(operation: u8, a: &str, b: &str) -> Option<String> {
    Some(match operation {
        0x00 => format!("{a}.wrapping_add({b})"),
        0x10 => format!("{a}.wrapping_sub({b})"),
        0x20 => format!("{a}.wrapping_mul({b})"),
        // RFC 9669, section 4.1: the quotient of a division by zero is 0, and the remainder is the dividend.
        0x30 => format!("{a}.checked_div({b}).unwrap_or(0)"),
        0x90 => format!("{a}.checked_rem({b}).unwrap_or({a})"),
        0x40 => format!("({a} | {b})"),
        0x50 => format!("({a} & {b})"),
        0xa0 => format!("({a} ^ {b})"),
        // Shifts take as many bits of the distance as they can use.
        0x60 => format!("{a}.wrapping_shl({b} as u32)"),
        0x70 => format!("{a}.wrapping_shr({b} as u32)"),
        0xc0 => format!("{a}.cast_signed().wrapping_shr({b} as u32).cast_unsigned()"),
        0xb0 => b.to_owned(),
        _ => return None,
    })
}

/// The condition of a jump; `None` if it is not known.
fn condition(instruction: &bpf_insn) -> Option<String> {
    let (a, b) = operands(instruction, instruction.code & 0x07 == 0x05);
    let plain = |comparison: &str| format!("{a} {comparison} {b}");
    let signed = |comparison: &str| format!("{a}.cast_signed() {comparison} {b}.cast_signed()");
    Some(match instruction.code & 0xf0 {
        0x10 => plain("=="),
        0x20 => plain(">"),
        0x30 => plain(">="),
        0x40 => format!("{a} & {b} != 0"),
        0x50 => plain("!="),
        0x60 => signed(">"),
        0x70 => signed(">="),
        0xa0 => plain("<"),
        0xb0 => plain("<="),
        0xc0 => signed("<"),
        0xd0 => signed("<="),
        _ => return None,
    })
}

/// Blocks of `part` that can reach one another without going through `heads`, in an order in which jumps between the
/// groups lead forward. The first holds `entry`; what cannot be reached from there is left out.
fn components(
    blocks: &BTreeMap<usize, Block>,
    part: &BTreeSet<usize>,
    entry: usize,
    heads: &[usize],
) -> Vec<BTreeSet<usize>> {
    let mut search = Search {
        blocks,
        part,
        heads,
        seen: BTreeMap::new(),
        stack: Vec::new(),
        found: Vec::new(),
    };
    search.visit(entry);
    search.found.reverse();
    search.found
}

/// Tarjan's search for strongly connected components, which finds the last ones first.
struct Search<'a> {
    blocks: &'a BTreeMap<usize, Block>,
    part: &'a BTreeSet<usize>,
    heads: &'a [usize],
    /// When a block was first seen, and the earliest block on the stack it can reach.
    seen: BTreeMap<usize, (usize, usize)>,
    stack: Vec<usize>,
    found: Vec<BTreeSet<usize>>,
}

impl Search<'_> {
    /// Returns the earliest block on the stack that `block` can reach.
    fn visit(&mut self, block: usize) -> usize {
        let number = self.seen.len();
        self.seen.insert(block, (number, number));
        self.stack.push(block);
        let mut earliest = number;
        for &next in &self.blocks[&block].successors {
            if !self.part.contains(&next) || self.heads.contains(&next) {
                continue;
            }
            let reached = match self.seen.get(&next) {
                None => self.visit(next),
                Some(&(number, _)) if self.stack.contains(&next) => number,
                Some(_) => continue,
            };
            earliest = earliest.min(reached);
        }
        self.seen.insert(block, (number, earliest));
        if earliest == number {
            let start = self.stack.iter().rposition(|&other| other == block).unwrap_or(0);
            self.found.push(self.stack.drain(start..).collect());
        }
        earliest
    }
}

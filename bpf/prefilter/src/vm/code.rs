//! Instructions, decoded once into a form that is quick to run.
//!
//! The instruction set is BPF's up to version 3, without atomics (RFC 9669). Jumps are resolved to indices and
//! two-slot constants to one operation. Accesses relative to the frame pointer are checked here, so that running
//! need not find out where they lead.

use aya_obj::generated::bpf_insn;

use crate::object::ObjectError;

/// Bytes of stack for each function.
pub(super) const FRAME: usize = 512;

/// Marks a map handle; the rest is the map's index.
pub(super) const HANDLE: u64 = 1 << 62;

/// The helpers a deterministic program may call.
pub(super) const HELPER_LOOKUP: i32 = 1;
pub(super) const HELPER_RESERVE: i32 = 131;
pub(super) const HELPER_SUBMIT: i32 = 132;

const FRAME_POINTER: u8 = 10;

/// The upper half of a handle.
const MAP: i32 = (HANDLE >> 32) as i32;

/// Hands the table of arithmetic operations and conditions to a macro: operation code, meaning, and the names of
/// the variants by width and second operand.
macro_rules! with_operations {
    ($then:ident) => {
        $then! {
            alu {
                0x00 |a, b| a.wrapping_add(b), Add64R Add64I Add32R Add32I;
                0x10 |a, b| a.wrapping_sub(b), Sub64R Sub64I Sub32R Sub32I;
                0x20 |a, b| a.wrapping_mul(b), Mul64R Mul64I Mul32R Mul32I;
                0x30 |a, b| a.checked_div(b).unwrap_or(0), Div64R Div64I Div32R Div32I;
                0x40 |a, b| a | b, Or64R Or64I Or32R Or32I;
                0x50 |a, b| a & b, And64R And64I And32R And32I;
                0x60 |a, b| a.wrapping_shl(b as u32), Lsh64R Lsh64I Lsh32R Lsh32I;
                0x70 |a, b| a.wrapping_shr(b as u32), Rsh64R Rsh64I Rsh32R Rsh32I;
                0x90 |a, b| a.checked_rem(b).unwrap_or(a), Mod64R Mod64I Mod32R Mod32I;
                0xa0 |a, b| a ^ b, Xor64R Xor64I Xor32R Xor32I;
                0xb0 |_a, b| b, Mov64R Mov64I Mov32R Mov32I;
                0xc0 |a, b| a.cast_signed().wrapping_shr(b as u32).cast_unsigned(), Ash64R Ash64I Ash32R Ash32I;
            }
            jump {
                0x10 |a, b| a == b, Eq64R Eq64I Eq32R Eq32I;
                0x20 |a, b| a > b, Gt64R Gt64I Gt32R Gt32I;
                0x30 |a, b| a >= b, Ge64R Ge64I Ge32R Ge32I;
                0x40 |a, b| a & b != 0, Set64R Set64I Set32R Set32I;
                0x50 |a, b| a != b, Ne64R Ne64I Ne32R Ne32I;
                0x60 |a, b| a.cast_signed() > b.cast_signed(), Sgt64R Sgt64I Sgt32R Sgt32I;
                0x70 |a, b| a.cast_signed() >= b.cast_signed(), Sge64R Sge64I Sge32R Sge32I;
                0xa0 |a, b| a < b, Lt64R Lt64I Lt32R Lt32I;
                0xb0 |a, b| a <= b, Le64R Le64I Le32R Le32I;
                0xc0 |a, b| a.cast_signed() < b.cast_signed(), Slt64R Slt64I Slt32R Slt32I;
                0xd0 |a, b| a.cast_signed() <= b.cast_signed(), Sle64R Sle64I Sle32R Sle32I;
            }
        }
    };
}
pub(super) use with_operations;

macro_rules! define {
    (
        alu { $($ac:literal |$aa:ident, $ab:ident| $ae:expr, $a64r:ident $a64i:ident $a32r:ident $a32i:ident;)* }
        jump { $($jc:literal |$ja:ident, $jb:ident| $je:expr, $j64r:ident $j64i:ident $j32r:ident $j32i:ident;)* }
    ) => {
        /// One operation in 8 bytes. Fields: registers, then offset or distance, then constant.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Op {
            $($a64r(u8, u8), $a64i(u8, i32), $a32r(u8, u8), $a32i(u8, i32),)*
            $($j64r(u8, u8, i16), $j64i(u8, i16, i32), $j32r(u8, u8, i16), $j32i(u8, i16, i32),)*
            Neg64(u8), Neg32(u8),
            /// Byte swaps to big-endian, and cuts to little-endian, of the number of bits named.
            Be16(u8), Be32(u8), Be64(u8), Le16(u8), Le32(u8),
            /// The lower half of a constant; the upper half follows.
            Constant(u8, i32),
            Upper(i32),
            Load8(u8, u8, i16), Load16(u8, u8, i16), Load32(u8, u8, i16), Load64(u8, u8, i16),
            Store8(u8, u8, i16), Store16(u8, u8, i16), Store32(u8, u8, i16), Store64(u8, u8, i16),
            Store8I(u8, i16, i32), Store16I(u8, i16, i32), Store32I(u8, i16, i32), Store64I(u8, i16, i32),
            /// From and to the frame, at an offset from its lowest byte.
            StackLoad8(u8, u16), StackLoad16(u8, u16), StackLoad32(u8, u16), StackLoad64(u8, u16),
            StackStore8(u8, u16), StackStore16(u8, u16), StackStore32(u8, u16), StackStore64(u8, u16),
            Goto(i32),
            Call(i32),
            Lookup, Reserve, Submit,
            Exit,
            // Fused: several operations that follow one another, done at once. The first one's place holds the
            // fused one; the others stay where they are, for jumps, and are skipped.
            /// `dst = src + constant`.
            Lea(u8, u8, i32),
            /// `dst = a + b`, of the registers `dst`, `a` and `b`.
            Sum(u8, u8, u8),
            /// Loads 16 bits in network order.
            LoadBe16(u8, u8, i16),
            /// Looks the key at a place in the frame up in a map.
            LookupIn(u16, i32),
            /// The same, with the map's handle at another place in the frame.
            LookupInStacked(u16, u16),
            /// Stores 32 bits in the frame, then [`Self::LookupIn`].
            StoreLookup(u8, u16),
            /// `And32I` of the index in the last register, `Sum`, and a load from there into that register:
            /// destination and base of the sum, index, constant.
            Index(u8, u8, u8, u16),
            /// `And64R`, then a store of the result in the frame: destination, source, place.
            AndStore(u8, u8, u16),
            /// `Add64R`, a 32-bit load from the sum, then `Eq32I` of what was loaded: destination, source.
            AddLoadEq(u8, u8),
            /// `Mov64I`, then `Eq64I` of another register: destination, constant.
            MovEq(u8, i32),
            /// `Mov64R`, then a store of 64 bits in the frame: destination, source.
            MovStore(u8, u8),
            /// 64 bits in the frame, then `Mov64R`: source, place.
            StoreMov(u8, u16),
            /// Adds a register, or a constant, to 64 bits in memory: loaded register, address, offset.
            Add64ToMemory(u8, u8, i16),
            /// [`Self::Lea`], then `Gt64R` of the result.
            LeaGt(u8, u8, i32),
        }

        fn alu(code: u8, wide: bool, register: bool, dst: u8, src: u8, imm: i32) -> Option<Op> {
            Some(match (code & 0xf0, wide, register) {
                $(
                    ($ac, true, true) => Op::$a64r(dst, src),
                    ($ac, true, false) => Op::$a64i(dst, imm),
                    ($ac, false, true) => Op::$a32r(dst, src),
                    ($ac, false, false) => Op::$a32i(dst, imm),
                )*
                _ => return None,
            })
        }

        fn jump(code: u8, wide: bool, register: bool, dst: u8, src: u8, distance: i16, imm: i32) -> Option<Op> {
            Some(match (code & 0xf0, wide, register) {
                $(
                    ($jc, true, true) => Op::$j64r(dst, src, distance),
                    ($jc, true, false) => Op::$j64i(dst, distance, imm),
                    ($jc, false, true) => Op::$j32r(dst, src, distance),
                    ($jc, false, false) => Op::$j32i(dst, distance, imm),
                )*
                _ => return None,
            })
        }
    };
}
with_operations!(define);

/// Decodes a program; the result has one operation for each slot, so that indices stay the same.
///
/// # Errors
///
/// [`ObjectError`] for an instruction, jump or helper that this machine does not know.
pub(super) fn decode(code: &[bpf_insn], maps: usize) -> Result<Vec<Op>, ObjectError> {
    let mut ops = Vec::with_capacity(code.len());
    let mut index = 0;
    while let Some(instruction) = code.get(index) {
        let op = decode_one(code, index, maps)?;
        ops.push(op);
        if instruction.code == LOAD_CONSTANT {
            ops.push(Op::Upper(upper_half(code, index)));
            index += 1;
        }
        index += 1;
    }
    fuse(&mut ops);
    match ops.last() {
        Some(Op::Exit | Op::Goto(_)) => Ok(ops),
        _ => Err(ObjectError::Jump { index: ops.len() }),
    }
}

const LOAD_CONSTANT: u8 = 0x18;

fn decode_one(code: &[bpf_insn], index: usize, maps: usize) -> Result<Op, ObjectError> {
    let instruction = &code[index];
    let bpf_insn {
        code: operation,
        off: offset,
        imm,
        ..
    } = *instruction;
    let (dst, src) = (instruction.dst_reg(), instruction.src_reg());
    let unknown = ObjectError::Instruction {
        index,
        code: operation,
    };
    let writes = |op: Option<Op>| op.filter(|_| dst < FRAME_POINTER);
    let checked = |distance: i32| {
        let target = usize::try_from(index as i64 + 1 + i64::from(distance)).ok();
        // The second half of a constant is no instruction.
        let is_sound =
            |&target: &usize| target < code.len() && (target == 0 || code[target - 1].code != LOAD_CONSTANT);
        target
            .filter(is_sound)
            .map(|_| distance)
            .ok_or(ObjectError::Jump { index })
    };
    if dst > FRAME_POINTER || src > FRAME_POINTER {
        return Err(unknown);
    }
    let wide = matches!(operation & 0x07, 0x05 | 0x07);
    let register = operation & 0x08 != 0;
    let op = match operation {
        LOAD_CONSTANT if index + 1 == code.len() => return Err(ObjectError::Jump { index }),
        LOAD_CONSTANT => match src {
            0 => writes(Some(Op::Constant(dst, imm))),
            1 if (imm as usize) < maps => writes(Some(Op::Constant(dst, imm))),
            _ => None,
        },
        0x85 if src == 1 => Some(Op::Call(checked(imm)?)),
        0x85 if src == 0 => match imm {
            HELPER_LOOKUP => Some(Op::Lookup),
            HELPER_RESERVE => Some(Op::Reserve),
            HELPER_SUBMIT => Some(Op::Submit),
            helper => return Err(ObjectError::Helper { index, helper }),
        },
        0x95 => Some(Op::Exit),
        0x05 => Some(Op::Goto(checked(i32::from(offset))?)),
        0x06 => Some(Op::Goto(checked(imm)?)),
        0x87 => writes(Some(Op::Neg64(dst))),
        0x84 => writes(Some(Op::Neg32(dst))),
        0xdc => writes(match imm {
            16 => Some(Op::Be16(dst)),
            32 => Some(Op::Be32(dst)),
            64 => Some(Op::Be64(dst)),
            _ => None,
        }),
        0xd4 => writes(match imm {
            16 => Some(Op::Le16(dst)),
            32 => Some(Op::Le32(dst)),
            // The machine is little-endian already.
            64 => Some(Op::Mov64R(dst, dst)),
            _ => None,
        }),
        // Version 4 gives offsets a meaning here.
        _ if matches!(operation & 0x07, 0x04 | 0x07) && offset == 0 => {
            writes(alu(operation, wide, register, dst, src, imm))
        }
        _ if matches!(operation & 0x07, 0x05 | 0x06) => {
            checked(i32::from(offset))?;
            jump(operation, wide, register, dst, src, offset, imm)
        }
        0x71 | 0x69 | 0x61 | 0x79 if src == FRAME_POINTER => {
            let size = size(operation);
            frame_offset(offset, size).and_then(|at| {
                writes(Some(match size {
                    1 => Op::StackLoad8(dst, at),
                    2 => Op::StackLoad16(dst, at),
                    4 => Op::StackLoad32(dst, at),
                    _ => Op::StackLoad64(dst, at),
                }))
            })
        }
        0x73 | 0x6b | 0x63 | 0x7b if dst == FRAME_POINTER => {
            let size = size(operation);
            frame_offset(offset, size).map(|at| match size {
                1 => Op::StackStore8(src, at),
                2 => Op::StackStore16(src, at),
                4 => Op::StackStore32(src, at),
                _ => Op::StackStore64(src, at),
            })
        }
        0x71 => writes(Some(Op::Load8(dst, src, offset))),
        0x69 => writes(Some(Op::Load16(dst, src, offset))),
        0x61 => writes(Some(Op::Load32(dst, src, offset))),
        0x79 => writes(Some(Op::Load64(dst, src, offset))),
        0x73 => Some(Op::Store8(dst, src, offset)),
        0x6b => Some(Op::Store16(dst, src, offset)),
        0x63 => Some(Op::Store32(dst, src, offset)),
        0x7b => Some(Op::Store64(dst, src, offset)),
        0x72 => Some(Op::Store8I(dst, offset, imm)),
        0x6a => Some(Op::Store16I(dst, offset, imm)),
        0x62 => Some(Op::Store32I(dst, offset, imm)),
        0x7a => Some(Op::Store64I(dst, offset, imm)),
        _ => None,
    };
    op.ok_or(unknown)
}

fn size(operation: u8) -> usize {
    match operation & 0x18 {
        0x10 => 1,
        0x08 => 2,
        0x00 => 4,
        _ => 8,
    }
}

/// The offset from the frame's lowest byte, if an access of `size` bytes there stays inside.
fn frame_offset(offset: i16, size: usize) -> Option<u16> {
    let at = FRAME as i32 + i32::from(offset);
    (0..=(FRAME - size) as i32).contains(&at).then_some(at as u16)
}

/// The upper half of a constant: for a map, what makes its index a handle.
fn upper_half(code: &[bpf_insn], index: usize) -> i32 {
    if code[index].src_reg() == 1 {
        MAP
    } else {
        code[index + 1].imm
    }
}

/// Puts operations that usually follow one another into the first one's place. What one step left is what the next
/// one finds, so that longer sequences grow from shorter ones.
fn fuse(ops: &mut [Op]) {
    fuse_each(ops, |ops| match *ops {
        [Op::Mov64R(dst, src), Op::Add64I(again, constant), ..] if dst == again => {
            Op::Lea(dst, src, constant)
        }
        [Op::Mov64R(dst, a), Op::Add64R(again, b), ..] if dst == again && dst != b => Op::Sum(dst, a, b),
        [Op::Load16(dst, src, offset), Op::Be16(again), ..] if dst == again => Op::LoadBe16(dst, src, offset),
        [
            Op::Load64(dst, src, offset),
            Op::Add64R(again, term),
            Op::Store64(to, what, at),
            ..,
        ] if dst == again && what == dst && to == src && at == offset && dst != src && term != dst => {
            Op::Add64ToMemory(dst, src, offset)
        }
        [
            Op::Load64(dst, src, offset),
            Op::Add64I(again, _),
            Op::Store64(to, what, at),
            ..,
        ] if dst == again && what == dst && to == src && at == offset && dst != src => {
            Op::Add64ToMemory(dst, src, offset)
        }
        [first, ..] => first,
        [] => Op::Exit,
    });
    fuse_each(ops, |ops| match *ops {
        [
            Op::Lea(2, FRAME_POINTER, offset),
            _,
            Op::Constant(1, map),
            Op::Upper(MAP),
            Op::Lookup,
            ..,
        ] => key_in_frame(offset).map_or(ops[0], |key| Op::LookupIn(key, map)),
        [
            Op::Lea(2, FRAME_POINTER, offset),
            _,
            Op::StackLoad64(1, handle),
            Op::Lookup,
            ..,
        ] => key_in_frame(offset).map_or(ops[0], |key| Op::LookupInStacked(key, handle)),
        [
            Op::And32I(index, mask @ 0..=0xffff),
            Op::Sum(dst, base, again),
            _,
            Op::Load64(to, from, 0),
            ..,
        ] if again == index && from == dst && to == index && base != index && dst != index => {
            Op::Index(dst, base, index, mask as u16)
        }
        [
            Op::Add64R(dst, src),
            Op::Load32(to, from, 0),
            Op::Eq32I(tested, ..),
            ..,
        ] if from == dst && tested == to => Op::AddLoadEq(dst, src),
        [Op::Lea(dst, src, constant), _, Op::Gt64R(tested, ..), ..] if tested == dst => {
            Op::LeaGt(dst, src, constant)
        }
        [Op::And64R(dst, src), Op::StackStore64(what, at), ..] if what == dst => Op::AndStore(dst, src, at),
        [Op::Mov64I(dst, constant), Op::Eq64I(tested, ..), ..] if tested != dst => Op::MovEq(dst, constant),
        [first, ..] => first,
        [] => Op::Exit,
    });
    fuse_each(ops, |ops| match *ops {
        [Op::StackStore32(src, at), Op::LookupIn(..), ..] => Op::StoreLookup(src, at),
        [Op::Mov64R(dst, src), Op::StackStore64(..), ..] => Op::MovStore(dst, src),
        [Op::StackStore64(src, at), Op::Mov64R(..), ..] => Op::StoreMov(src, at),
        [first, ..] => first,
        [] => Op::Exit,
    });
}

fn fuse_each(ops: &mut [Op], fused: impl Fn(&[Op]) -> Op) {
    for index in 0..ops.len() {
        ops[index] = fused(&ops[index..]);
    }
}

/// The place in the frame of a key at `offset` from the frame pointer.
fn key_in_frame(offset: i32) -> Option<u16> {
    i16::try_from(offset)
        .ok()
        .and_then(|offset| frame_offset(offset, 1))
}

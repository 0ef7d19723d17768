//! Runs decoded programs.

use super::Fault;
use super::code::{FRAME, HANDLE, Op, with_operations};
use super::memory::{At, InFrame, MAX_FRAMES, Memory};

/// Most backward jumps and calls of one run: far more than the verifier's bounded loops can take.
const FUEL: u32 = 1 << 16;

/// A call to return from.
#[derive(Clone, Copy, Default)]
struct Frame {
    return_to: usize,
    saved: [u64; 4],
}

macro_rules! define {
    (
        alu { $($ac:literal |$aa:ident, $ab:ident| $ae:expr, $a64r:ident $a64i:ident $a32r:ident $a32i:ident;)* }
        jump { $($jc:literal |$ja:ident, $jb:ident| $je:expr, $j64r:ident $j64i:ident $j32r:ident $j32i:ident;)* }
    ) => {
        /// Runs `code` with the context at `context` in register 1 and returns register 0.
        ///
        /// # Errors
        ///
        /// [`Fault`] for what the kernel's verifier would have ruled out.
        pub(super) fn execute(
            code: &[Op],
            memory: &mut Memory,
            packet: &[u8],
            context: u64,
        ) -> Result<u64, Fault> {
            let mut registers = Registers([0; 16]);
            let mut frames = [Frame::default(); MAX_FRAMES - 1];
            let mut depth = 0usize;
            let mut stack = 0usize;
            let mut fuel = FUEL;
            let mut next = 0usize;
            registers.set(1, context);
            registers.set(10, Memory::frame_pointer(0));
            loop {
                let Some(op) = code.get(next) else { return Err(Fault::End) };
                next += 1;
                match *op {
                    $(
                        Op::$a64r(dst, src) => {
                            let ($aa, $ab) = (registers.get(dst), registers.get(src));
                            registers.set(dst, $ae);
                        }
                        Op::$a64i(dst, imm) => {
                            let ($aa, $ab) = (registers.get(dst), imm as u64);
                            registers.set(dst, $ae);
                        }
                        Op::$a32r(dst, src) => {
                            let ($aa, $ab) = (registers.get(dst) as u32, registers.get(src) as u32);
                            registers.set(dst, u64::from($ae));
                        }
                        Op::$a32i(dst, imm) => {
                            let ($aa, $ab) = (registers.get(dst) as u32, imm as u32);
                            registers.set(dst, u64::from($ae));
                        }
                    )*
                    $(
                        Op::$j64r(dst, src, distance) => {
                            let ($ja, $jb) = (registers.get(dst), registers.get(src));
                            if $je {
                                next = jump(next, i32::from(distance), &mut fuel)?;
                            }
                        }
                        Op::$j64i(dst, distance, imm) => {
                            let ($ja, $jb) = (registers.get(dst), imm as u64);
                            if $je {
                                next = jump(next, i32::from(distance), &mut fuel)?;
                            }
                        }
                        Op::$j32r(dst, src, distance) => {
                            let ($ja, $jb) = (registers.get(dst) as u32, registers.get(src) as u32);
                            if $je {
                                next = jump(next, i32::from(distance), &mut fuel)?;
                            }
                        }
                        Op::$j32i(dst, distance, imm) => {
                            let ($ja, $jb) = (registers.get(dst) as u32, imm as u32);
                            if $je {
                                next = jump(next, i32::from(distance), &mut fuel)?;
                            }
                        }
                    )*
                    Op::Neg64(dst) => registers.set(dst, registers.get(dst).wrapping_neg()),
                    Op::Neg32(dst) => registers.set(dst, u64::from((registers.get(dst) as u32).wrapping_neg())),
                    Op::Be16(dst) => registers.set(dst, u64::from((registers.get(dst) as u16).swap_bytes())),
                    Op::Be32(dst) => registers.set(dst, u64::from((registers.get(dst) as u32).swap_bytes())),
                    Op::Be64(dst) => registers.set(dst, registers.get(dst).swap_bytes()),
                    Op::Le16(dst) => registers.set(dst, u64::from(registers.get(dst) as u16)),
                    Op::Le32(dst) => registers.set(dst, u64::from(registers.get(dst) as u32)),
                    Op::Constant(dst, lower) => {
                        let Some(&Op::Upper(upper)) = code.get(next) else { return Err(Fault::End) };
                        registers.set(dst, u64::from(lower as u32) | u64::from(upper as u32) << 32);
                        next += 1;
                    }
                    // Decoding lets nothing jump here.
                    Op::Upper(_) => return Err(Fault::End),
                    Op::Sum(dst, a, b) => {
                        registers.set(dst, registers.get(a).wrapping_add(registers.get(b)));
                        next += 1;
                    }
                    Op::StoreLookup(src, at) => {
                        let Some(&Op::LookupIn(key, map)) = code.get(next) else { return Err(Fault::End) };
                        memory.write_frame(stack, at, (registers.get(src) as u32).to_le_bytes());
                        let value = memory.lookup(&InFrame { frame: stack, at: key }, HANDLE | map as u64)?;
                        registers.returned(value);
                        next += 5;
                    }
                    Op::Index(dst, base, index, mask) => {
                        let offset = registers.get(index) & u64::from(mask);
                        let address = registers.get(base).wrapping_add(offset);
                        registers.set(dst, address);
                        registers.set(index, u64::from_le_bytes(memory.load(packet, address)?));
                        next += 3;
                    }
                    Op::AndStore(dst, src, at) => {
                        let value = registers.get(dst) & registers.get(src);
                        registers.set(dst, value);
                        memory.write_frame(stack, at, value.to_le_bytes());
                        next += 1;
                    }
                    Op::AddLoadEq(dst, src) => {
                        let [Op::Load32(to, _, offset), Op::Eq32I(_, distance, imm), ..] = code[next..] else {
                            return Err(Fault::End);
                        };
                        let address = registers.get(dst).wrapping_add(registers.get(src));
                        registers.set(dst, address);
                        let bytes = memory.load(packet, address.wrapping_add(offset as u64))?;
                        let value = u32::from_le_bytes(bytes);
                        registers.set(to, u64::from(value));
                        next += 2;
                        if value == imm as u32 {
                            next = jump(next, i32::from(distance), &mut fuel)?;
                        }
                    }
                    Op::MovEq(dst, constant) => {
                        let Some(&Op::Eq64I(tested, distance, imm)) = code.get(next) else {
                            return Err(Fault::End);
                        };
                        registers.set(dst, constant as u64);
                        next += 1;
                        if registers.get(tested) == imm as u64 {
                            next = jump(next, i32::from(distance), &mut fuel)?;
                        }
                    }
                    Op::MovStore(dst, src) => {
                        let Some(&Op::StackStore64(what, at) | &Op::StoreMov(what, at)) = code.get(next) else { return Err(Fault::End) };
                        registers.set(dst, registers.get(src));
                        memory.write_frame(stack, at, registers.get(what).to_le_bytes());
                        next += 1;
                    }
                    Op::StoreMov(src, at) => {
                        let Some(&Op::Mov64R(to, from) | &Op::MovStore(to, from)) = code.get(next) else { return Err(Fault::End) };
                        memory.write_frame(stack, at, registers.get(src).to_le_bytes());
                        registers.set(to, registers.get(from));
                        next += 1;
                    }
                    Op::Add64ToMemory(dst, src, offset) => {
                        let address = registers.address(src, offset);
                        let term = match code.get(next) {
                            Some(&Op::Add64R(_, term)) => registers.get(term),
                            Some(&Op::Add64I(_, constant)) => constant as u64,
                            _ => return Err(Fault::End),
                        };
                        let sum = u64::from_le_bytes(memory.load(packet, address)?).wrapping_add(term);
                        registers.set(dst, sum);
                        memory.store(address, sum.to_le_bytes())?;
                        next += 2;
                    }
                    Op::LeaGt(dst, src, constant) => {
                        let Some(&Op::Gt64R(_, limit, distance)) = code.get(next + 1) else {
                            return Err(Fault::End);
                        };
                        let value = registers.get(src).wrapping_add(constant as u64);
                        registers.set(dst, value);
                        next += 2;
                        if value > registers.get(limit) {
                            next = jump(next, i32::from(distance), &mut fuel)?;
                        }
                    }
                    Op::LoadBe16(dst, src, offset) => {
                        let bytes = memory.load(packet, registers.address(src, offset))?;
                        registers.set(dst, u64::from(u16::from_be_bytes(bytes)));
                        next += 1;
                    }
                    Op::LookupIn(at, map) => {
                        let value = memory.lookup(&InFrame { frame: stack, at }, HANDLE | map as u64)?;
                        registers.returned(value);
                        next += 4;
                    }
                    Op::LookupInStacked(at, handle) => {
                        let handle = u64::from_le_bytes(memory.read_frame(stack, handle));
                        let value = memory.lookup(&InFrame { frame: stack, at }, handle)?;
                        registers.returned(value);
                        next += 3;
                    }
                    Op::Lea(dst, src, constant) => {
                        registers.set(dst, registers.get(src).wrapping_add(constant as u64));
                        next += 1;
                    }
                    Op::Load8(dst, src, offset) => {
                        let bytes = memory.load(packet, registers.address(src, offset))?;
                        registers.set(dst, u64::from(u8::from_le_bytes(bytes)));
                    }
                    Op::Load16(dst, src, offset) => {
                        let bytes = memory.load(packet, registers.address(src, offset))?;
                        registers.set(dst, u64::from(u16::from_le_bytes(bytes)));
                    }
                    Op::Load32(dst, src, offset) => {
                        let bytes = memory.load(packet, registers.address(src, offset))?;
                        registers.set(dst, u64::from(u32::from_le_bytes(bytes)));
                    }
                    Op::Load64(dst, src, offset) => {
                        let bytes = memory.load(packet, registers.address(src, offset))?;
                        registers.set(dst, u64::from_le_bytes(bytes));
                    }
                    Op::Store8(dst, src, offset) => {
                        let value = registers.get(src) as u8;
                        memory.store(registers.address(dst, offset), value.to_le_bytes())?;
                    }
                    Op::Store16(dst, src, offset) => {
                        let value = registers.get(src) as u16;
                        memory.store(registers.address(dst, offset), value.to_le_bytes())?;
                    }
                    Op::Store32(dst, src, offset) => {
                        let value = registers.get(src) as u32;
                        memory.store(registers.address(dst, offset), value.to_le_bytes())?;
                    }
                    Op::Store64(dst, src, offset) => {
                        let value = registers.get(src);
                        memory.store(registers.address(dst, offset), value.to_le_bytes())?;
                    }
                    Op::Store8I(dst, offset, imm) => {
                        memory.store(registers.address(dst, offset), (imm as u8).to_le_bytes())?;
                    }
                    Op::Store16I(dst, offset, imm) => {
                        memory.store(registers.address(dst, offset), (imm as u16).to_le_bytes())?;
                    }
                    Op::Store32I(dst, offset, imm) => {
                        memory.store(registers.address(dst, offset), imm.to_le_bytes())?;
                    }
                    Op::Store64I(dst, offset, imm) => {
                        memory.store(registers.address(dst, offset), i64::from(imm).to_le_bytes())?;
                    }
                    Op::StackLoad8(dst, at) => {
                        registers.set(dst, u64::from(u8::from_le_bytes(memory.read_frame(stack, at))));
                    }
                    Op::StackLoad16(dst, at) => {
                        registers.set(dst, u64::from(u16::from_le_bytes(memory.read_frame(stack, at))));
                    }
                    Op::StackLoad32(dst, at) => {
                        registers.set(dst, u64::from(u32::from_le_bytes(memory.read_frame(stack, at))));
                    }
                    Op::StackLoad64(dst, at) => {
                        registers.set(dst, u64::from_le_bytes(memory.read_frame(stack, at)));
                    }
                    Op::StackStore8(src, at) => {
                        memory.write_frame(stack, at, (registers.get(src) as u8).to_le_bytes());
                    }
                    Op::StackStore16(src, at) => {
                        memory.write_frame(stack, at, (registers.get(src) as u16).to_le_bytes());
                    }
                    Op::StackStore32(src, at) => {
                        memory.write_frame(stack, at, (registers.get(src) as u32).to_le_bytes());
                    }
                    Op::StackStore64(src, at) => {
                        memory.write_frame(stack, at, registers.get(src).to_le_bytes());
                    }
                    Op::Goto(distance) => next = jump(next, distance, &mut fuel)?,
                    Op::Call(distance) => {
                        let Some(frame) = frames.get_mut(depth) else { return Err(Fault::CallDepth) };
                        *frame = Frame { return_to: next, saved: registers.preserved() };
                        depth += 1;
                        stack = depth * FRAME;
                        registers.set(10, Memory::frame_pointer(depth));
                        next = jump(next, distance, &mut fuel)?;
                    }
                    Op::Lookup => {
                        let value = memory.lookup(&At { packet, address: registers.get(2) }, registers.get(1))?;
                        registers.returned(value);
                    }
                    Op::Reserve => {
                        let record = memory.reserve(registers.get(1), registers.get(2))?;
                        registers.returned(record);
                    }
                    Op::Submit => {
                        memory.submit(registers.get(1))?;
                        registers.returned(0);
                    }
                    Op::Exit => {
                        let Some(above) = depth.checked_sub(1) else { return Ok(registers.get(0)) };
                        depth = above;
                        stack = depth * FRAME;
                        let Frame { return_to, saved } = frames[depth];
                        registers.restore(saved);
                        registers.set(10, Memory::frame_pointer(depth));
                        next = return_to;
                    }
                }
            }
        }
    };
}
with_operations!(define);

#[inline(always)]
fn jump(next: usize, distance: i32, fuel: &mut u32) -> Result<usize, Fault> {
    if distance < 0 {
        *fuel = fuel.checked_sub(1).ok_or(Fault::Fuel)?;
    }
    Ok(next.wrapping_add(distance as usize))
}

/// Registers 0 to 10; the rest is there so that a masked index needs no check.
struct Registers([u64; 16]);

impl Registers {
    #[inline(always)]
    fn get(&self, register: u8) -> u64 {
        self.0[usize::from(register & 15)]
    }

    #[inline(always)]
    fn set(&mut self, register: u8, value: u64) {
        self.0[usize::from(register & 15)] = value;
    }

    #[inline(always)]
    fn address(&self, register: u8, offset: i16) -> u64 {
        self.get(register).wrapping_add(offset as u64)
    }

    /// Takes a helper's result. What is in the arguments' registers then is nobody's business.
    #[inline(always)]
    fn returned(&mut self, value: u64) {
        self.0[0] = value;
    }

    /// Registers 6 to 9, which belong to the caller.
    fn preserved(&self) -> [u64; 4] {
        [self.0[6], self.0[7], self.0[8], self.0[9]]
    }

    fn restore(&mut self, saved: [u64; 4]) {
        self.0[6..10].copy_from_slice(&saved);
    }
}

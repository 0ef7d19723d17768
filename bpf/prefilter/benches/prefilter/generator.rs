//! A program that sends frames with random source addresses, which the kernel makes and hands to it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_prog_type};

use super::lists::{BASE, STRIDE};

const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;

/// Frames that the kernel makes at once: as many as a virtual interface takes in one go.
const BATCH: u32 = 64;

/// Which addresses packets come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sources {
    /// Listed ones.
    Listed,
    /// Others between them.
    Between,
    /// Others, far away.
    Away,
}

impl Sources {
    pub(crate) const ALL: [Self; 3] = [Self::Listed, Self::Between, Self::Away];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Listed => "listed",
            Self::Between => "between",
            Self::Away => "away",
        }
    }
}

/// The program.
pub(crate) struct Generator(OwnedFd);

impl Generator {
    /// One that redirects frames to the interface with this index, or drops them.
    pub(crate) fn load(sources: Sources, entries: u32, interface: Option<u32>) -> io::Result<Self> {
        let code = code(sources, entries, interface);
        // SAFETY: plain numbers, which may all be zero.
        let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the member of the union that loading uses.
        let load = unsafe { &mut attr.__bindgen_anon_3 };
        load.prog_type = bpf_prog_type::BPF_PROG_TYPE_XDP as u32;
        load.insns = code.as_ptr() as u64;
        load.insn_cnt = code.len() as u32;
        load.license = c"GPL".as_ptr() as u64;
        let descriptor = bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr)?;
        // SAFETY: the kernel has just made it, for nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    /// Sends this many frames.
    pub(crate) fn send(&self, frame: &[u8], count: u32) -> io::Result<()> {
        // SAFETY: plain numbers, which may all be zero.
        let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
        attr.test.prog_fd = self.0.as_raw_fd() as u32;
        attr.test.data_in = frame.as_ptr() as u64;
        attr.test.data_size_in = frame.len() as u32;
        attr.test.repeat = count;
        attr.test.flags = BPF_F_TEST_XDP_LIVE_FRAMES;
        attr.test.batch_size = BATCH;
        bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr).map(drop)
    }

    pub(crate) fn descriptor(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: `attr` is a whole attribute, and what it points to lives in the callers.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as libc::c_int, attr, size_of::<bpf_attr>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}

/// Makes the kernel keep the time of every run of a program, as long as this is held.
pub(crate) fn keep_time() -> io::Result<OwnedFd> {
    // SAFETY: plain numbers, which may all be zero; and zero is the kind of statistics.
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    let descriptor = bpf(bpf_cmd::BPF_ENABLE_STATS, &mut attr)?;
    // SAFETY: the kernel has just made it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// An instruction: operation code, registers, offset, constant.
fn instruction(code: u8, dst: u8, src: u8, offset: i16, imm: u32) -> [u8; 8] {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = imm.to_le_bytes();
    [code, dst | src << 4, low, high, a, b, c, d]
}

/// Writes a source address into an IPv4 header behind an Ethernet header, and what it takes from the checksum into
/// the identification, so that the checksum stays right.
fn code(sources: Sources, entries: u32, interface: Option<u32>) -> Vec<[u8; 8]> {
    const PASS: u32 = 2;
    const DROP: u32 = 1;
    const RANDOM: u32 = 7;
    const REDIRECT: u32 = 23;
    let wide = |operation: u8, dst, imm| instruction(operation | 0x07, dst, 0, 0, imm);
    let narrow = |operation: u8, dst, imm| instruction(operation | 0x04, dst, 0, 0, imm);
    let narrow_by = |operation: u8, dst, src| instruction(operation | 0x0c, dst, src, 0, 0);
    let (add, or, and, shift_left, shift_right, remainder, xor, set) =
        (0x00, 0x40, 0x50, 0x60, 0x70, 0x90, 0xa0, 0xb0);
    let call = |helper| instruction(0x85, 0, 0, 0, helper);
    let exit = instruction(0x95, 0, 0, 0, 0);

    // r7 is the frame's start; frames that are too short are passed.
    let mut code = vec![
        instruction(0x61, 7, 1, 0, 0),
        instruction(0x61, 2, 1, 4, 0),
        instruction(0xbf, 3, 7, 0, 0),
        wide(add, 3, 34),
        instruction(0xbd, 3, 2, 2, 0),
        wide(set, 0, PASS),
        exit,
        call(RANDOM),
    ];
    // w1 is the address: of a pair of entries, w2, the first or the second half.
    let pairs = (entries / 2).max(1);
    code.extend([
        narrow_by(set, 1, 0),
        narrow(and, 1, 0x00ff_ffff),
        narrow(remainder, 1, pairs),
        narrow_by(set, 2, 1),
        narrow(shift_left, 1, STRIDE.ilog2()),
        narrow(add, 1, BASE),
        narrow(and, 2, 0xff),
    ]);
    match sources {
        Sources::Listed if entries == 1 => {}
        Sources::Listed => code.extend([
            // By one bit, the single address, or any of the /24.
            narrow_by(set, 3, 0),
            narrow(shift_right, 3, 24),
            instruction(0xb4, 4, 0, 0, 0),
            narrow_by(or, 4, 0),
            instruction(0x66, 4, 0, 2, u32::MAX), // signed, above -1: the top bit is clear
            narrow_by(or, 1, 3),
            instruction(0x05, 0, 0, 2, 0),
            narrow(or, 1, 256),
            narrow_by(or, 1, 2),
        ]),
        Sources::Between => code.extend([narrow(xor, 2, 1), narrow(or, 1, 256), narrow_by(or, 1, 2)]),
        Sources::Away => code.extend([
            narrow_by(set, 1, 0),
            narrow(and, 1, 0x003f_ffff),
            narrow(or, 1, 0x6400_0000),
        ]),
    }
    code.extend([
        // w3 = ~(high + low), folded.
        narrow_by(set, 3, 1),
        narrow(shift_right, 3, 16),
        narrow_by(set, 4, 1),
        narrow(and, 4, 0xffff),
        narrow_by(add, 3, 4),
        narrow_by(set, 4, 3),
        narrow(shift_right, 4, 16),
        narrow_by(add, 3, 4),
        narrow(xor, 3, u32::MAX),
        instruction(0xdc, 3, 0, 0, 16),
        instruction(0x6b, 7, 3, 18, 0),
        instruction(0xdc, 1, 0, 0, 32),
        instruction(0x63, 7, 1, 26, 0),
    ]);
    match interface {
        Some(index) => code.extend([wide(set, 1, index), wide(set, 2, 0), call(REDIRECT), exit]),
        None => code.extend([wide(set, 0, DROP), exit]),
    }
    code
}

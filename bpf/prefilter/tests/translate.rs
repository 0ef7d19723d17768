//! The translation takes this program's instructions, and refuses what it does not know.

#[path = "../src/object.rs"]
#[allow(dead_code, unreachable_pub, reason = "the crate uses the rest")]
mod object;
#[path = "../build/translate.rs"]
mod translate;

use aya_obj::generated::bpf_insn;
use object::{ObjectError, Program};

const EXIT: (u8, u8, u8, i16, i32) = (0x95, 0, 0, 0, 0);

/// Translates instructions given as operation code, destination and source register, offset and constant.
fn translate(code: &[(u8, u8, u8, i16, i32)]) -> Result<String, ObjectError> {
    let code = code.iter().map(|&(code, dst, src, offset, imm)| {
        let registers = bpf_insn::new_bitfield_1(dst, src);
        bpf_insn {
            code,
            _bitfield_align_1: [],
            _bitfield_1: registers,
            off: offset,
            imm,
        }
    });
    translate::translate(&Program {
        code: code.collect(),
        maps: Vec::new(),
    })
}

fn refused(code: &[(u8, u8, u8, i16, i32)]) -> ObjectError {
    translate(code).expect_err("this is not to be translated")
}

#[test]
fn branches_and_loops_become_labelled_blocks() {
    // r1 = r1 - 1, again and again, until it is 0; then r0 = 2.
    let code = [(0x17, 1, 0, 0, 1), (0x55, 1, 0, -2, 0), (0xb4, 0, 0, 0, 2), EXIT];
    let lines = translate(&code).expect("a sound program");
    let lines: Vec<&str> = lines.lines().skip(5).collect();
    let expected = [
        "'b2: {",
        "'l0: loop {",
        "memory.spend()?;",
        "r1 = u64::from(r1.wrapping_sub(0x1u64));",
        "if r1 != 0x0u64 { continue 'l0; }",
        "break 'b2;",
        "}",
        "}",
        "r0 = u64::from(0x2u32);",
        "return Ok(r0);",
        "}",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn unknown_instructions_are_refused() {
    // An atomic addition, a jump by a register, a sign-extending move and load, a write to the frame pointer, a map
    // that is not there, and a store outside of the frame.
    let unknown = [
        (0xdb, 10, 1, -8, 0),
        (0x0d, 1, 0, 0, 0),
        (0xbf, 1, 2, 8, 0),
        (0x91, 1, 2, 0, 0),
        (0xb7, 10, 0, 0, 0),
        (0x7b, 10, 1, -520, 0),
        (0x7b, 10, 1, 0, 0),
    ];
    for instruction in unknown {
        let error = refused(&[instruction, EXIT]);
        assert!(
            matches!(error, ObjectError::Instruction { index: 0, .. }),
            "{instruction:?}: {error}"
        );
    }
    let map = refused(&[(0x18, 1, 1, 0, 0), (0, 0, 0, 0, 0), EXIT]);
    assert!(matches!(map, ObjectError::Instruction { .. }), "{map}");
}

#[test]
fn jumps_lead_to_instructions_of_the_same_function() {
    let constant = [(0x18, 1, 0, 0, 0), (0, 0, 0, 0, 0)];
    let outside: [&[_]; 5] = [
        &[(0x05, 0, 0, 5, 0), EXIT],
        &[(0x05, 0, 0, -2, 0), EXIT],
        &[(0x05, 0, 0, 1, 0), constant[0], constant[1], EXIT],
        // Into a function, from one, and past the end.
        &[(0x85, 0, 1, 0, 1), (0x05, 0, 0, 0, 0), EXIT],
        &[(0xb7, 0, 0, 0, 0)],
    ];
    for code in outside {
        let error = refused(code);
        assert!(matches!(error, ObjectError::Jump { .. }), "{code:?}: {error}");
    }
}

#[test]
fn helpers_that_know_more_than_packet_and_lists_are_refused() {
    // Time, randomness, the number of the CPU.
    for helper in [5, 7, 8] {
        let error = refused(&[(0x85, 0, 0, 0, helper), EXIT]);
        assert!(
            matches!(error, ObjectError::Helper { index: 0, helper: other } if other == helper),
            "{error}"
        );
    }
}

#[test]
fn functions_that_call_themselves_are_refused() {
    let error = refused(&[(0x85, 0, 1, 0, 1), EXIT, (0x85, 0, 1, 0, -1), EXIT]);
    assert!(matches!(error, ObjectError::Jump { .. }), "{error}");
}

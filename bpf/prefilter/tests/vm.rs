//! The interpreted program decides as a linear scan behind a parser of its own does.

mod common;

use common::frames::{frame, lists};
use common::model::{Expected, judge};
use proptest::prelude::*;
use tungate_engine::policy::{ListEntry, PolicySpec, RuleRef};
use tungate_prefilter::{Action, Reason, Sampling, Verdict, Vm};

const NOW: u64 = 5;

fn vm(lists: &[ListEntry]) -> Vm {
    let mut vm = Vm::interpreted(Sampling::default()).expect("the committed object is sound");
    vm.apply(
        &PolicySpec {
            lists: lists.to_vec(),
            ..PolicySpec::default()
        },
        NOW,
    )
    .expect("lists fit");
    vm
}

fn told(verdict: Verdict) -> Expected {
    let entry = match verdict.rule {
        Some(RuleRef::List(index)) => Some(index),
        Some(RuleRef::Rule(_) | RuleRef::Default) => panic!("the pre-filter knows list entries only"),
        None => None,
    };
    let drop = verdict.action == Action::Drop;
    assert_eq!(drop, verdict.reason.is_drop());
    Expected {
        entry,
        drop,
        by_source: verdict.reason == Reason::ListSource,
    }
}

/// Passes do not say by which address they were allowed.
fn comparable(expected: Expected) -> Expected {
    Expected {
        by_source: expected.by_source && expected.drop,
        ..expected
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_program_decides_as_the_model_does(lists in lists(), frames in prop::collection::vec(frame(), 1..20)) {
        let mut vm = vm(&lists);
        for frame in frames {
            let verdict = vm.run(&frame).expect("no frame makes the program fail");
            prop_assert_eq!(told(verdict), comparable(judge(&frame, &lists, NOW, &[])), "frame {:02x?}", frame);
        }
    }
}

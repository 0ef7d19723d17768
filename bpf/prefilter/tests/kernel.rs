//! The kernel decides, counts and reports as the virtual machine does. Without root and BPF, tests are skipped aloud.

mod common;

use common::frames::{entry, frame, lists};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::FileFailurePersistence;
use tungate_engine::policy::{ListEntry, PolicySpec};
use tungate_prefilter::kernel::{Kernel, KernelError, Options};
use tungate_prefilter::{Backend, Counters, Error, PacketEvent, Prefilter, Sampling, Vm};

const NOW: u64 = 5;

fn kernel(sampling: Sampling) -> Option<Prefilter<Kernel>> {
    match Prefilter::load(Options {
        sampling,
        ..Options::default()
    }) {
        Ok(kernel) => Some(kernel),
        Err(Error::Kernel(error @ (KernelError::NotPermitted { .. } | KernelError::TooOld { .. }))) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn apply<B: Backend>(prefilter: &mut Prefilter<B>, lists: &[ListEntry]) {
    prefilter
        .apply(
            &PolicySpec {
                lists: lists.to_vec(),
                ..PolicySpec::default()
            },
            NOW,
        )
        .expect("lists fit");
}

fn events<B: Backend>(prefilter: &mut Prefilter<B>) -> Vec<PacketEvent> {
    std::iter::from_fn(|| prefilter.next_event().expect("events can be read")).collect()
}

fn counters<B: Backend>(prefilter: &mut Prefilter<B>) -> Counters {
    prefilter.counters().expect("counters can be read")
}

/// Frames of lengths the kernel runs a program over.
fn runnable_frame() -> impl Strategy<Value = Vec<u8>> {
    frame().prop_filter("the kernel wants a whole Ethernet header", |frame| {
        frame.len() >= 14
    })
}

fn config() -> ProptestConfig {
    let regressions = FileFailurePersistence::WithSource("regressions");
    ProptestConfig {
        cases: 50,
        failure_persistence: Some(Box::new(regressions)),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn verdicts_counters_and_events_are_those_of_the_virtual_machine(
        lists in lists(),
        frames in vec(runnable_frame(), 50..150),
    ) {
        let Some(mut kernel) = kernel(Sampling::ALL) else { return Ok(()) };
        let mut vm = Vm::simulated(Sampling::ALL).expect("the object is sound");
        apply(&mut kernel, &lists);
        apply(&mut vm, &lists);
        for frame in &frames {
            let (in_kernel, in_vm) = (kernel.run(frame), vm.run(frame));
            prop_assert_eq!(in_kernel.expect("it runs"), in_vm.expect("it runs"), "frame {:02x?}", frame);
        }
        prop_assert_eq!(events(&mut kernel), events(&mut vm));
        prop_assert_eq!(counters(&mut kernel), counters(&mut vm));
    }

    #[test]
    fn single_changes_in_the_kernel_come_to_the_same_as_in_the_virtual_machine(
        lists in vec(entry(), 0..8),
        changes in vec(prop_oneof![entry().prop_map(Ok), any::<Index>().prop_map(Err)], 1..12),
        frames in vec(runnable_frame(), 20..30),
    ) {
        let Some(mut kernel) = kernel(Sampling::ALL) else { return Ok(()) };
        let mut vm = Vm::simulated(Sampling::ALL).expect("the object is sound");
        apply(&mut kernel, &lists);
        apply(&mut vm, &lists);
        for change in changes {
            match change {
                Ok(entry) => {
                    let added = kernel.add(entry.clone(), NOW).expect("it fits");
                    prop_assert_eq!(added, vm.add(entry, NOW).expect("it fits"));
                }
                Err(index) if vm.entries().len() > 0 => {
                    let position = index.index(vm.entries().len()) as u32;
                    let removed = kernel.remove(position).expect("it is there");
                    prop_assert_eq!(removed, vm.remove(position).expect("it is there"));
                }
                Err(_) => {}
            }
            for frame in &frames {
                let (in_kernel, in_vm) = (kernel.run(frame), vm.run(frame));
                prop_assert_eq!(in_kernel.expect("it runs"), in_vm.expect("it runs"), "frame {:02x?}", frame);
            }
        }
        prop_assert_eq!(counters(&mut kernel), counters(&mut vm));
    }
}

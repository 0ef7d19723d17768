//! Who goes before whom in a real-time run: a machine has few cores, and what waits for one looks like a queue.

/// A thread's part in a run; those above go before those below, and all before what else the machine does.
#[derive(Debug, Clone, Copy)]
pub(super) enum Priority {
    /// What takes data to send, and holds the socket's lock meanwhile.
    Source = 10,
    /// The appliance that sends.
    Appliance = 20,
    /// What takes data received: acknowledgments wait while it holds the socket's lock.
    Sink = 30,
    /// The forwarder.
    Path = 40,
}

/// Makes this thread, and what it starts, a real-time one with timers exact to a microsecond, as far as that is allowed.
pub(super) fn raise(priority: Priority) {
    let parameters = libc::sched_param {
        sched_priority: priority as libc::c_int,
    };
    // SAFETY: the parameters live through the call; 0 is this thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
    // SAFETY: the call takes numbers.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}

//! The shim: what runs inside the traced process.
//!
//! It is linked to one address, has no library, no memory of its own but the thread's stack in its
//! [`Area`] and the [`Control`] page, and makes no call but those that it serves. Whatever it does not
//! serve completely goes to the supervisor through the stub that called it, with every register as it was.
#![no_std]
#![no_main]

mod call;
mod calls;
mod clock;
mod entry;
mod files;
mod log;
mod mapping;
mod memory;
mod nr;
mod outputs;
mod replay;
mod sockets;
mod stable;
mod wait;

use ftrun_abi::fast::{AREA_BYTES, AREAS_BASE, Area, CALLS_PER_TURN, CONTROL_BASE, Control, Frame, REPLAY};

/// The page that is shared with the supervisor.
fn control() -> &'static mut Control {
    // SAFETY: the supervisor maps the page here before any thread can reach the shim, and only one thread
    // of the process runs at a time, so this is the only reference while a call is served.
    unsafe { &mut *(CONTROL_BASE as *mut Control) }
}

/// The number of a thread's area.
fn slot(area: &Area) -> usize {
    ((area.this - AREAS_BASE) / AREA_BYTES) as usize
}

/// Takes a call out of the thread's budget; false when nothing is left. A thread that has had its share passes the
/// turn on first.
fn spend(control: &Control, call: &call::Call) -> bool {
    use core::sync::atomic::Ordering::Relaxed;
    let calls = control.turn_calls.load(Relaxed).saturating_add(1);
    control.turn_calls.store(calls, Relaxed);
    // Whether a futex call waits must not hang on what others do between its arrival and its being tried.
    let over = control.wanting.load(Relaxed) != 0 && calls > CALLS_PER_TURN && call.number != nr::FUTEX;
    if over && !wait::pass_turn(control, call) {
        return false;
    }
    let left = control.budget.load(Relaxed);
    if left == u64::MAX {
        return true;
    }
    control.budget.store(left.saturating_sub(1), Relaxed);
    left > 0
}

/// Serves a call. Returns 1 when it has been served, 0 when the supervisor has to do it.
#[unsafe(no_mangle)]
extern "C" fn shim_serve(frame: &mut Frame, area: &mut Area) -> u64 {
    use core::sync::atomic::Ordering::Relaxed;
    let control = control();
    let [a5, a4, a3, a2, a1, a0] = frame.args;
    let call = call::Call { tid: area.tid, number: frame.rax, args: [a0, a1, a2, a3, a4, a5], slot: slot(area) };
    let served = if control.mode.load(Relaxed) == REPLAY {
        replay::serve(control, &call)
    } else if control.slow.load(Relaxed) == 0 && spend(control, &call) {
        calls::serve(control, &call)
    } else {
        None
    };
    let Some(result) = served else { return 0 };
    control.fast.store(control.fast.load(Relaxed) + 1, Relaxed);
    frame.rax = result as u64;
    // Behind the slow part, `syscall` and a near jump, the distance of the jump tells where the program goes on.
    // SAFETY: `back` is the return address into a stub that the supervisor has written.
    let distance = unsafe { ((frame.back + 3) as *const i32).read_unaligned() };
    frame.back = (frame.back + 7).wrapping_add_signed(i64::from(distance));
    1
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        // SAFETY: an instruction that traps; the supervisor reports the place.
        unsafe { core::arch::asm!("ud2") };
    }
}

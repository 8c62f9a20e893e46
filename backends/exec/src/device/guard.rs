//! Panics as errors. What burn and cubecl cannot do on a device they say by panicking, out of memory first of all, on a
//! thread of their own as well; their functions return no errors. So here, at the boundary, panics are caught.

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use awqc_passes::ExecError;

/// How many calls of [`guard`] are at work.
static GUARDED: AtomicUsize = AtomicUsize::new(0);
/// What the first panic among them said: those that follow speak of what it left undone.
static FIRST: Mutex<Option<String>> = Mutex::new(None);

/// What `work` returns; an error if it panics. What a panic says is then the error's text, and is not printed.
///
/// # Errors
/// Those of `work`, and a panic.
pub(super) fn guard<R>(work: impl FnOnce() -> Result<R, ExecError>) -> Result<R, ExecError> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            if GUARDED.load(Ordering::SeqCst) == 0 {
                return before(info);
            }
            let said = info.payload_as_str().unwrap_or("the tensor library panicked").to_owned();
            FIRST.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(said);
        }));
    });
    GUARDED.fetch_add(1, Ordering::SeqCst);
    // Nobody looks at what a panic left half done: whoever gets the error gives up.
    let done = catch_unwind(AssertUnwindSafe(work));
    GUARDED.fetch_sub(1, Ordering::SeqCst);
    let first = FIRST.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (done, first) {
        (Ok(Ok(done)), None) => Ok(done),
        (Ok(Err(ExecError::Unavailable(said))), None) => Err(failure(&said)),
        (Ok(Err(error)), None) => Err(error),
        (_, Some(said)) => Err(failure(&said)),
        (Err(_), None) => Err(failure("the tensor library panicked")),
    }
}

/// The error that a message of the device's means: without its backtraces and without the text of kernels.
fn failure(said: &str) -> ExecError {
    let told =
        ["Backtrace", "backtrace:", "[Source]"].iter().fold(said, |said, end| said.split(end).next().unwrap_or(""));
    let lines: Vec<&str> = told.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let told: String = lines.join(" ").chars().take(600).collect();
    match ["can't allocate buffer", "OUT_OF_MEMORY"].iter().any(|word| said.contains(word)) {
        true => ExecError::Memory(format!("the CUDA device has too little memory: {told}")),
        false => ExecError::Unavailable(format!("the CUDA device failed: {told}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_errors() {
        let error = guard(|| -> Result<(), _> { panic!("can't allocate buffer") }).expect_err("a panic");
        assert!(
            matches!(&error, ExecError::Memory(m) if m.ends_with("too little memory: can't allocate buffer")),
            "{error}"
        );
        let elsewhere = || {
            let lost = std::thread::spawn(|| panic!("the first\n  and more\nBacktrace:\n a")).join().is_err();
            assert!(lost, "the thread panics");
            Err::<(), _>(ExecError::Unavailable("the second".into()))
        };
        let error = guard(elsewhere).expect_err("an error");
        assert!(
            matches!(&error, ExecError::Unavailable(m) if m == "the CUDA device failed: the first and more"),
            "{error}"
        );
        assert_eq!(guard(|| Ok(3)).expect("no panic"), 3);
        assert!(matches!(guard(|| Err::<(), _>(ExecError::Interrupted)), Err(ExecError::Interrupted)));
    }
}

//! A team of threads that walks through a model's stages in step.
//!
//! A token takes a few hundred stages of some microseconds each. So the threads are started once, get one job for a
//! whole forward pass, and meet at spinning barriers between stages; they sleep only between jobs. How a stage is cut
//! over the team never changes a result: every number is computed by one member, in an order of its own.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Turns of a spinning loop before a waiting member lets other programs run.
const SPINS: u32 = 1 << 14;

/// What the members work on.
type Job = *const (dyn Fn(&Member<'_>) + Sync);

/// A pointer to a job, valid while [`Pool::run`] waits for it.
#[derive(Clone, Copy)]
struct Posted(Job);

// SAFETY: the job is `Sync`, and `Pool::run` keeps it alive until every member is done with it.
unsafe impl Send for Posted {}

/// A member of the team during a job.
pub struct Member<'a> {
    /// From 0; the caller of [`Pool::run`] is 0.
    pub index: usize,
    /// Members in all.
    pub count: usize,
    barrier: &'a Barrier,
}

impl Member<'_> {
    /// Waits until every member is here.
    ///
    /// # Panics
    /// When another member has panicked: it will never come.
    pub fn wait(&self) {
        self.barrier.wait(self.count);
    }

    /// This member's part of `0..n`, cut at multiples of `step`. The parts cover the range and do not overlap.
    pub fn share(&self, n: usize, step: usize) -> Range<usize> {
        let pieces = n.div_ceil(step);
        let cut = |i: usize| (pieces * i / self.count * step).min(n);
        cut(self.index)..cut(self.index + 1)
    }
}

/// Where members meet; reusable at once.
#[derive(Default)]
struct Barrier {
    arrived: AtomicUsize,
    round: AtomicUsize,
    broken: AtomicBool,
}

impl Barrier {
    fn wait(&self, count: usize) {
        if count == 1 {
            return;
        }
        let round = self.round.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == count {
            self.arrived.store(0, Ordering::Relaxed);
            self.round.store(round.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut spins = 0;
        while self.round.load(Ordering::Acquire) == round {
            assert!(!self.broken.load(Ordering::Relaxed), "another thread of the team failed");
            spin(&mut spins);
        }
    }
}

fn spin(spins: &mut u32) {
    if *spins < SPINS {
        *spins += 1;
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

/// What the members share between jobs.
struct Shared {
    /// The job, and how many there have been.
    posted: Mutex<(usize, Option<Posted>)>,
    /// The number of jobs again, for members that still spin.
    jobs: AtomicUsize,
    wake: Condvar,
    stop: AtomicBool,
    /// Members, without the caller, that are done with the current job.
    done: AtomicUsize,
    barrier: Barrier,
}

/// The team. Dropping it ends its threads.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A team of `count` members, the caller's thread included.
    pub fn new(count: usize) -> Self {
        let shared = Arc::new(Shared {
            posted: Mutex::new((0, None)),
            jobs: AtomicUsize::new(0),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            done: AtomicUsize::new(0),
            barrier: Barrier::default(),
        });
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        // A system that gives fewer threads gets a smaller team: the count must be known before the first one works.
        let gate = Arc::new(AtomicUsize::new(0));
        for index in 1..count.max(1) {
            let (shared, gate) = (Arc::clone(&shared), Arc::clone(&gate));
            let thread = std::thread::Builder::new().name(format!("awqc-{index}"));
            match thread.spawn(move || member(&shared, &gate, index)) {
                Ok(handle) => threads.push(handle),
                Err(_) => break,
            }
        }
        gate.store(threads.len() + 1, Ordering::Release);
        Self { shared, threads }
    }

    /// Members of the team.
    pub fn count(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `job` on every member and waits for all.
    ///
    /// # Panics
    /// When the job panics on a member.
    pub fn run(&mut self, job: &(dyn Fn(&Member<'_>) + Sync)) {
        let (shared, count) = (&*self.shared, self.count());
        if count > 1 {
            // SAFETY: only the lifetime changes. Below, this function waits until every member has left the job, also
            // when its own part panics.
            let forever: Job = unsafe { std::mem::transmute::<*const (dyn Fn(&Member<'_>) + Sync + '_), Job>(job) };
            shared.done.store(0, Ordering::Relaxed);
            let mut posted = shared.posted.lock().unwrap_or_else(PoisonError::into_inner);
            *posted = (posted.0.wrapping_add(1), Some(Posted(forever)));
            shared.jobs.store(posted.0, Ordering::Release);
            drop(posted);
            shared.wake.notify_all();
        }
        let own = Member { index: 0, count, barrier: &shared.barrier };
        let result = catch_unwind(AssertUnwindSafe(|| job(&own)));
        if result.is_err() {
            shared.barrier.broken.store(true, Ordering::Relaxed);
        }
        let mut spins = 0;
        while shared.done.load(Ordering::Acquire) + 1 < count {
            spin(&mut spins);
        }
        let broken = shared.barrier.broken.swap(false, Ordering::Relaxed);
        shared.barrier.arrived.store(0, Ordering::Relaxed);
        if let Err(panic) = result {
            resume_unwind(panic);
        }
        assert!(!broken, "a thread of the team failed");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        drop(self.shared.posted.lock());
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

/// The life of a member other than the caller.
fn member(shared: &Shared, gate: &AtomicUsize, index: usize) {
    let count = loop {
        match gate.load(Ordering::Acquire) {
            0 => std::thread::yield_now(),
            count => break count,
        }
    };
    let mut seen = 0;
    loop {
        // The next token mostly comes at once: spin for a while before sleeping.
        for _ in 0..SPINS {
            if shared.jobs.load(Ordering::Acquire) != seen || shared.stop.load(Ordering::Relaxed) {
                break;
            }
            std::hint::spin_loop();
        }
        let mut posted = shared.posted.lock().unwrap_or_else(PoisonError::into_inner);
        while posted.0 == seen && !shared.stop.load(Ordering::Relaxed) {
            posted = shared.wake.wait(posted).unwrap_or_else(PoisonError::into_inner);
        }
        let (number, Some(Posted(job))) = *posted else { return };
        drop(posted);
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        seen = number;
        let own = Member { index, count, barrier: &shared.barrier };
        // SAFETY: `Pool::run` keeps the job alive until `done` counts this member.
        let job = unsafe { &*job };
        if catch_unwind(AssertUnwindSafe(|| job(&own))).is_err() {
            shared.barrier.broken.store(true, Ordering::Relaxed);
        }
        shared.done.fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_meet_between_stages() {
        for count in [1, 2, 3, 7] {
            let mut pool = Pool::new(count);
            let cells: Vec<AtomicUsize> = (0..64).map(|_| AtomicUsize::new(0)).collect();
            for round in 0..50 {
                pool.run(&|m| {
                    for stage in 0..8 {
                        for i in m.share(64, 3) {
                            assert_eq!(cells[i].fetch_add(1, Ordering::Relaxed), round * 8 + stage);
                        }
                        m.wait();
                        assert!(cells.iter().all(|c| c.load(Ordering::Relaxed) > round * 8 + stage));
                        m.wait();
                    }
                });
            }
        }
    }

    #[test]
    fn shares_cover_without_overlap() {
        let barrier = Barrier::default();
        for count in 1..6 {
            for (n, step) in [(0, 4), (1, 4), (17, 4), (64, 16), (3, 1)] {
                let shares = (0..count).map(|index| Member { index, count, barrier: &barrier }.share(n, step));
                let all: Vec<usize> = shares.flatten().collect();
                assert_eq!(all, (0..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_failure_reaches_the_caller_and_the_team_goes_on() {
        let mut pool = Pool::new(3);
        for bad in 0..3 {
            let failed = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|m| {
                    assert_ne!(m.index, bad, "on purpose");
                    m.wait();
                });
            }));
            assert!(failed.is_err());
            let sum = AtomicUsize::new(0);
            pool.run(&|m| {
                sum.fetch_add(m.index, Ordering::Relaxed);
                m.wait();
            });
            assert_eq!(sum.into_inner(), 3);
        }
    }
}

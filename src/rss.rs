//! What the process has used: memory, and time on processors.

/// The largest resident set so far, in bytes; `None` where the system does not tell.
pub(crate) fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Seconds that all threads together have run so far; `None` where the system does not tell.
pub(crate) fn busy() -> Option<f64> {
    // The kernel counts hundredths here, whatever its own clock.
    const TICKS: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name stands in parentheses, and may hold any character.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut times = fields.split_whitespace().skip(11).map(|f| f.parse::<f64>().ok());
    Some((times.next()?? + times.next()??) / TICKS)
}

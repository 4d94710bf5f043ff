//! The instructions that move stores from the CPU's caches to persistent memory.
//!
//! [`write_back`] starts the write-back of cache lines and [`fence`] waits for it: together they make earlier stores of
//! this thread durable on a mapping of persistent memory. On other memory they are harmless. Nothing here checks which of
//! the two a range is.
#![allow(unsafe_code)]

use std::sync::OnceLock;

/// Bytes of a cache line on every CPU with persistent memory that this crate knows (x86-64 and AArch64 servers).
pub(super) const LINE_BYTES: usize = 64;

/// How this CPU writes a line back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriteBack {
    /// CLWB: unordered, keeps the line.
    #[cfg(target_arch = "x86_64")]
    Clwb,
    /// CLFLUSHOPT: unordered, evicts the line.
    #[cfg(target_arch = "x86_64")]
    ClflushOpt,
    /// CLFLUSH: every x86-64 has it; one line at a time, evicts the line.
    #[cfg(target_arch = "x86_64")]
    Clflush,
    /// DC CVAP: to the point of persistence.
    #[cfg(target_arch = "aarch64")]
    DcCvap,
    /// DC CVAC: to the point of coherency, which is the best that a CPU without DC CVAP offers.
    #[cfg(target_arch = "aarch64")]
    DcCvac,
}

/// Starts the write-back of every cache line that `start..start + len_bytes` touches.
///
/// # Safety
///
/// The range is mapped and readable.
#[inline]
pub(super) unsafe fn write_back(start: *const u8, len_bytes: usize) {
    if len_bytes == 0 {
        return;
    }
    let instruction = detected();
    let misalignment = start.addr() % LINE_BYTES;
    let first_line = start.wrapping_sub(misalignment);
    for line in (0..len_bytes + misalignment).step_by(LINE_BYTES) {
        // SAFETY: the line holds a byte of the range, so it lies in a mapped page; the instruction was detected.
        unsafe { write_back_line(instruction, first_line.wrapping_add(line)) };
    }
}

/// Waits until the write-backs and non-temporal stores that this thread has started are durable.
#[inline]
pub(super) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SFENCE is part of SSE, which every x86-64 has.
    unsafe {
        core::arch::x86_64::_mm_sfence();
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier has no operands and changes no state.
    unsafe {
        core::arch::asm!("dsb sy", options(nostack, preserves_flags));
    }
}

fn detected() -> WriteBack {
    static DETECTED: OnceLock<WriteBack> = OnceLock::new();
    *DETECTED.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe, reason = "CPUID became a safe function in later compilers than the oldest supported one")]
fn detect() -> WriteBack {
    use core::arch::x86_64::{__cpuid, __cpuid_count};
    // Intel SDM volume 2, CPUID: leaf 7 sub-leaf 0, EBX bit 24 is CLWB and bit 23 is CLFLUSHOPT.
    const CLWB: u32 = 1 << 24;
    const CLFLUSHOPT: u32 = 1 << 23;
    // SAFETY: every x86-64 has CPUID.
    let leaf_max = unsafe { __cpuid(0) }.eax;
    // SAFETY: as above.
    let features = if leaf_max >= 7 { unsafe { __cpuid_count(7, 0) }.ebx } else { 0 };
    if features & CLWB != 0 {
        WriteBack::Clwb
    } else if features & CLFLUSHOPT != 0 {
        WriteBack::ClflushOpt
    } else {
        WriteBack::Clflush
    }
}

/// # Safety
///
/// - `line` lies in a mapped, readable page.
/// - The CPU has the instruction.
#[cfg(target_arch = "x86_64")]
unsafe fn write_back_line(instruction: WriteBack, line: *const u8) {
    match instruction {
        // SAFETY: the caller vouches for the page and the CPU.
        WriteBack::Clwb => unsafe {
            core::arch::asm!("clwb [{line}]", line = in(reg) line, options(nostack, preserves_flags));
        },
        // SAFETY: the caller vouches for the page and the CPU.
        WriteBack::ClflushOpt => unsafe {
            core::arch::asm!("clflushopt [{line}]", line = in(reg) line, options(nostack, preserves_flags));
        },
        // SAFETY: the caller vouches for the page; every x86-64 has CLFLUSH.
        WriteBack::Clflush => unsafe { core::arch::x86_64::_mm_clflush(line) },
    }
}

#[cfg(target_arch = "aarch64")]
fn detect() -> WriteBack {
    // SAFETY: getauxval reads a table that the kernel filled before the program began.
    let capabilities = unsafe { libc::getauxval(libc::AT_HWCAP) };
    if capabilities & libc::HWCAP_DCPOP != 0 { WriteBack::DcCvap } else { WriteBack::DcCvac }
}

/// # Safety
///
/// - `line` lies in a mapped, readable page.
/// - The CPU has the instruction.
#[cfg(target_arch = "aarch64")]
unsafe fn write_back_line(instruction: WriteBack, line: *const u8) {
    match instruction {
        // SAFETY: the caller vouches for the page and the CPU. The encoding is DC CVAP, spelt so that the assembler
        // needs no feature flag.
        WriteBack::DcCvap => unsafe {
            core::arch::asm!("sys #3, c7, c12, #1, {line}", line = in(reg) line, options(nostack, preserves_flags));
        },
        // SAFETY: the caller vouches for the page; every AArch64 has DC CVAC, and Linux permits it to programs.
        WriteBack::DcCvac => unsafe {
            core::arch::asm!("dc cvac, {line}", line = in(reg) line, options(nostack, preserves_flags));
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_back_bytes_stay_what_they_were() {
        let bytes: Vec<u8> = (0..=255).cycle().take(4096 + 77).collect();
        let copy = bytes.clone();
        for range in [0..0, 0..1, 63..65, 1..4096, 0..bytes.len()] {
            // SAFETY: the range lies within the vector.
            unsafe { write_back(bytes.as_ptr().wrapping_add(range.start), range.len()) };
        }
        fence();
        assert_eq!(bytes, copy);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_instruction_up_to_the_detected_one_runs() {
        let line = [7_u8; LINE_BYTES];
        let all = [WriteBack::Clflush, WriteBack::ClflushOpt, WriteBack::Clwb];
        let best = all.iter().position(|&each| each == detected()).unwrap();
        for &instruction in &all[..=best] {
            // SAFETY: the line is readable; a CPU with a later instruction of the list has the earlier ones.
            unsafe { write_back_line(instruction, line.as_ptr()) };
        }
        fence();
        assert_eq!(line, [7; LINE_BYTES]);
    }
}

//! The kernel's interfaces: userfaultfd, `/proc/PID/pagemap` and its scan.

use crate::state::Mapping;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Flags for userfaultfd(2). User-mode-only is what an ordinary user is allowed; with asynchronous
/// write protection it tracks writes by the kernel all the same.
pub const UFFD_FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK | 1;

const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32.cast_signed() as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32.cast_signed() as libc::Ioctl;
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32.cast_signed() as libc::Ioctl;

const UFFD_API: u64 = 0xaa;
const FEATURE_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 2;

/// The page was written since it was protected.
pub(super) const WRITTEN: u64 = 1 << 1;
/// The page is a file's (or shared memory's), not anonymous.
pub(super) const FILE: u64 = 1 << 2;
/// The page is in memory.
pub(super) const PRESENT: u64 = 1 << 3;
/// The page is in swap, or a marker of the kernel stands in its place.
pub(super) const SWAPPED: u64 = 1 << 4;
/// The kernel's page of zeros.
pub(super) const PFNZERO: u64 = 1 << 5;
/// A guard page of `MADV_GUARD_INSTALL`.
pub(super) const GUARD: u64 = 1 << 8;

const SCAN_WP_MATCHING: u64 = 1;
const SCAN_CHECK_WPASYNC: u64 = 2;

/// Neighbouring pages of one kind.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Bits as above.
    pub(super) is: u64,
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RegisterArg {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

fn ioctl<T>(fd: BorrowedFd<'_>, request: libc::Ioctl, arg: &mut T) -> io::Result<i32> {
    // SAFETY: each caller pairs the request with the structure whose size the request encodes.
    let n = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(arg)) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(n)
}

/// Switches a new userfaultfd to asynchronous write protection.
pub(super) fn uffd_api(uffd: BorrowedFd<'_>) -> io::Result<()> {
    let base = FEATURE_WP | FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED;
    let mut last = None;
    for features in [base | FEATURE_WP_HUGETLBFS_SHMEM, base, FEATURE_WP_ASYNC] {
        let mut arg = ApiArg { api: UFFD_API, features, ioctls: 0 };
        match ioctl(uffd, UFFDIO_API, &mut arg) {
            Ok(_) => return Ok(()),
            Err(e) => last = Some(e),
        }
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::Unsupported.into()))
}

/// Registers the mappings in a range for write protection. Those already registered stay so.
pub(super) fn uffd_register(uffd: BorrowedFd<'_>, start: u64, end: u64) -> io::Result<()> {
    let mut arg = RegisterArg { start, len: end - start, mode: REGISTER_MODE_WP, ioctls: 0 };
    ioctl(uffd, UFFDIO_REGISTER, &mut arg).map(drop)
}

/// `/proc/PID/pagemap`.
#[derive(Debug)]
pub(super) struct Pagemap {
    file: File,
    /// Bits that this kernel can return.
    known: u64,
    buf: Vec<Region>,
}

impl Pagemap {
    pub(super) fn open(pid: i32) -> io::Result<Self> {
        Ok(Self {
            file: File::open(format!("/proc/{pid}/pagemap"))?,
            known: WRITTEN | FILE | PRESENT | SWAPPED | PFNZERO | GUARD,
            buf: vec![Region::default(); 2048],
        })
    }

    /// The file, for reading words.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Pages of a mapping that are in memory or in swap.
    pub(super) fn present(&mut self, m: &Mapping) -> io::Result<Vec<Region>> {
        self.scan(m, 0, 0)
    }

    /// Anonymous pages of a mapping that were written since the last call, protected again in the
    /// same step. File pages are left alone: a write replaces one by a new, unprotected page.
    /// EPERM: something in the range is not registered; the range may then be half done.
    pub(super) fn protect(&mut self, m: &Mapping) -> io::Result<Vec<Region>> {
        self.scan(m, SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC, WRITTEN)
    }

    fn scan(&mut self, m: &Mapping, flags: u64, mut all_of: u64) -> io::Result<Vec<Region>> {
        // Telling file pages from others makes the kernel look at each page's descriptor, which
        // costs several times the rest.
        let (mut known, mut none_of) = (self.known, 0);
        let plain = ["[heap]", "[stack", "[anon:"];
        let anon = m.path.is_empty() || plain.iter().any(|p| m.path.starts_with(p));
        if anon && m.inode == 0 && !m.shared {
            known &= !FILE;
        } else if all_of != 0 {
            none_of = FILE;
            all_of |= FILE;
        }
        let (start, end) = (m.start, m.end);
        let mut out: Vec<Region> = Vec::new();
        let mut at = start;
        while at < end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags,
                start: at,
                end,
                vec: self.buf.as_mut_ptr() as u64,
                vec_len: self.buf.len() as u64,
                category_mask: all_of,
                category_inverted: none_of,
                category_anyof_mask: PRESENT | SWAPPED,
                return_mask: known,
                ..ScanArg::default()
            };
            let n = match ioctl(std::os::fd::AsFd::as_fd(&self.file), PAGEMAP_SCAN, &mut arg) {
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) && self.known & GUARD != 0 => {
                    self.known &= !GUARD;
                    known &= !GUARD;
                    continue;
                }
                other => other?,
            };
            out.extend_from_slice(&self.buf[..n as usize]);
            if arg.walk_end <= at {
                return Err(io::Error::other("PAGEMAP_SCAN makes no progress"));
            }
            at = arg.walk_end;
        }
        Ok(out)
    }
}

//! The memory layout of a process, from `/proc/PID/maps`.

use crate::state::Mapping;
use std::io;

/// Reads the mappings of a process, ascending. `[vsyscall]` is left out: it is the kernel's, the
/// same in every process.
///
/// A path that is not UTF-8 has its wrong bytes replaced; such a file cannot be opened again by
/// that name.
pub fn read_maps(pid: i32) -> io::Result<Vec<Mapping>> {
    parse_maps(&std::fs::read(format!("/proc/{pid}/maps"))?)
}

/// Parses the text of a maps file.
pub fn parse_maps(text: &[u8]) -> io::Result<Vec<Mapping>> {
    let text = String::from_utf8_lossy(text);
    let mut out = Vec::new();
    for line in text.split('\n').filter(|l| !l.is_empty()) {
        let mapping = parse_line(line).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("a line of /proc/PID/maps is not understood: {line:?}"))
        })?;
        if mapping.path != "[vsyscall]" {
            out.push(mapping);
        }
    }
    Ok(out)
}

fn parse_line(line: &str) -> Option<Mapping> {
    // start-end perms offset major:minor inode   path
    let (range, rest) = line.split_once(' ')?;
    let (perms, rest) = rest.split_once(' ')?;
    let (offset, rest) = rest.split_once(' ')?;
    let (dev, rest) = rest.split_once(' ')?;
    let (inode, path) = rest.split_once(' ').unwrap_or((rest, ""));
    let (start, end) = range.split_once('-')?;
    let (major, minor) = dev.split_once(':')?;
    let perms: [u8; 4] = perms.as_bytes().try_into().ok()?;
    let mut prot = 0;
    for (flag, letter, bit) in
        [(perms[0], b'r', libc::PROT_READ), (perms[1], b'w', libc::PROT_WRITE), (perms[2], b'x', libc::PROT_EXEC)]
    {
        if flag == letter {
            prot |= bit.cast_unsigned();
        } else if flag != b'-' {
            return None;
        }
    }
    let hex32 = |s| u32::from_str_radix(s, 16).ok();
    let hex64 = |s| u64::from_str_radix(s, 16).ok();
    // The kernel pads the path to a column and writes a newline in it as \012, nothing else.
    let path = path.trim_start_matches(' ').replace("\\012", "\n");
    Some(Mapping {
        start: hex64(start)?,
        end: hex64(end)?,
        prot,
        shared: match perms[3] {
            b's' => true,
            b'p' => false,
            _ => return None,
        },
        grows_down: path == "[stack]",
        offset: hex64(offset)?,
        dev: libc::makedev(hex32(major)?, hex32(minor)?),
        inode: inode.parse().ok()?,
        path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_every_kind_of_line() {
        let text = b"\
55d0c0000000-55d0c0001000 r-xp 00002000 fe:01 1234                       /usr/bin/a b\\012c (deleted)\n\
7f0000000000-7f0000001000 rw-s 00000000 00:01 77                         /dev/zero (deleted)\n\
7f0000002000-7f0000003000 ---p 00000000 00:00 0 \n\
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]\n\
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";
        let maps = parse_maps(text).expect("valid");
        assert_eq!(maps.len(), 4);
        assert_eq!(maps[0].path, "/usr/bin/a b\nc (deleted)");
        assert_eq!(maps[0].prot, 5);
        assert_eq!(maps[0].offset, 0x2000);
        assert_eq!(maps[0].dev, libc::makedev(0xfe, 1));
        assert_eq!(maps[0].inode, 1234);
        assert!(maps[1].shared && maps[1].prot == 3);
        assert!(maps[2].path.is_empty() && maps[2].prot == 0 && maps[2].inode == 0);
        assert!(maps[3].grows_down);
    }

    #[test]
    fn bad_lines_are_errors() {
        for bad in ["x", "1-2 rwxp", "1-2 rwzp 0 0:0 0", "1-2 rwxq 0 0:0 0", "g-2 rwxp 0 0:0 0"] {
            assert!(parse_maps(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn reads_its_own() {
        let maps = read_maps(std::process::id().cast_signed()).expect("own maps");
        assert!(maps.iter().any(|m| m.grows_down));
        assert!(maps.windows(2).all(|w| w[0].end <= w[1].start));
    }
}

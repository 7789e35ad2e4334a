//! The shim as bytes, to be mapped into the traced process. Its source is in `code/`; `build.rs` makes it.

include!(concat!(env!("OUT_DIR"), "/shim.rs"));

/// The code, from [`ftrun_abi::fast::CODE_BASE`] on.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shim.bin"));

/// Where stubs enter it.
pub const fn entry() -> u64 {
    ENTRY
}

/// Where a thread that faulted in it is sent: stack pointer at its [`ftrun_abi::fast::Frame`], `eax` 1 if its
/// call has been served, 0 if the supervisor has to serve it.
pub const fn leave() -> u64 {
    LEAVE
}

#[cfg(test)]
mod tests {
    use super::*;
    use ftrun_abi::fast::{CODE_BASE, CODE_BYTES_MAX};

    #[test]
    fn the_code_is_where_it_was_linked_to_be() {
        let end = CODE_BASE + IMAGE.len() as u64;
        assert!(IMAGE.len() as u64 <= CODE_BYTES_MAX);
        for address in [entry(), leave()] {
            assert!((CODE_BASE..end).contains(&address), "{address:#x}");
        }
        // push rax; pushfq; cld
        assert_eq!(IMAGE[(entry() - CODE_BASE) as usize..][..3], [0x50, 0x9c, 0xfc]);
    }
}

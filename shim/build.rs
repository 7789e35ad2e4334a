//! Builds the shim's code: a static program without libraries, linked to its one address, whose segments
//! become one piece of memory. It is compiled by the same compiler for the same target, always optimised.

use std::path::PathBuf;
use std::process::Command;

/// `ftrun_abi::fast::CODE_BASE`, checked by a test.
const CODE_BASE: u64 = 0x6f00_8000_0000;

fn main() {
    let root = PathBuf::from(var("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(var("OUT_DIR"));
    for watched in ["code", "abi/src", "build.rs"] {
        println!("cargo:rerun-if-changed={}", root.join(watched).display());
    }
    let common = [
        "--edition=2024",
        "-Copt-level=3",
        "-Cpanic=abort",
        "-Crelocation-model=pic",
        "-Ccodegen-units=1",
        "-Cno-vectorize-loops",
        "-Cno-vectorize-slp",
    ];
    let abi = out.join("libftrun_abi.rlib");
    let mut command = compiler();
    command.args(common).args(["--crate-name=ftrun_abi", "--crate-type=rlib"]).arg("-o").arg(&abi);
    run(command.arg(root.join("abi/src/lib.rs")));
    let program = out.join("shim");
    let mut command = compiler();
    command.args(common).args(["--crate-name=shim", "--crate-type=bin", "-Dwarnings"]);
    command.arg("--extern").arg(format!("ftrun_abi={}", abi.display()));
    for arg in ["-nostdlib", "-nostartfiles", "-static", "-no-pie", "-Wl,--gc-sections,--build-id=none,-z,norelro"] {
        command.arg(format!("-Clink-arg={arg}"));
    }
    command.arg(format!("-Clink-arg=-Wl,-e,shim_entry,--image-base={CODE_BASE:#x}"));
    run(command.arg("-o").arg(&program).arg(root.join("code/main.rs")));
    let elf = std::fs::read(&program).expect("the linked shim");
    let image = image(&elf);
    std::fs::write(out.join("shim.bin"), &image).expect("writing the image");
    check_vectors(&elf);
    let leave = symbol(&elf, "shim_leave");
    let entry = symbol(&elf, "shim_entry");
    let text = format!("const ENTRY: u64 = {entry:#x};\nconst LEAVE: u64 = {leave:#x};\n");
    std::fs::write(out.join("shim.rs"), text).expect("writing the addresses");
}

fn var(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn compiler() -> Command {
    let mut command = Command::new(var("RUSTC"));
    command.arg("--target").arg(var("TARGET"));
    command
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(status.success(), "{command:?}: {status}");
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// The loadable segments in one piece from `CODE_BASE` on. Nothing in them may be relocated when the program
/// starts: nobody would do it.
fn image(elf: &[u8]) -> Vec<u8> {
    let (table, count) = (number(elf, 32, 8) as usize, number(elf, 56, 2) as usize);
    let mut image = Vec::new();
    for i in 0..count {
        let header = &elf[table + i * 56..][..56];
        let (kind, flags) = (number(header, 0, 4), number(header, 4, 4));
        let (offset, address, size, memory) =
            (number(header, 8, 8), number(header, 16, 8), number(header, 32, 8), number(header, 40, 8));
        assert!(kind != 2 && kind != 3, "the shim is linked dynamically");
        if kind != 1 || memory == 0 {
            continue;
        }
        // Constants that hold addresses are linked into a writable segment. The image is mapped read-only.
        assert!(flags & 2 == 0 || size == memory, "the shim has variables");
        let at = usize::try_from(address - CODE_BASE).expect("an address");
        image.resize(image.len().max(at + memory as usize), 0);
        image[at..at + size as usize].copy_from_slice(&elf[offset as usize..(offset + size) as usize]);
    }
    assert!(!image.is_empty(), "the shim has no code");
    image
}

/// Address of a symbol, from the symbol table.
fn symbol(elf: &[u8], name: &str) -> u64 {
    let found = symbols(elf).into_iter().find(|s| s.0 == name);
    found.unwrap_or_else(|| panic!("the shim has no symbol {name}")).1
}

/// Name, address and size of each function.
fn symbols(elf: &[u8]) -> Vec<(String, u64, u64)> {
    let mut symbols = vec![];
    let (table, size, count) = (number(elf, 40, 8) as usize, number(elf, 58, 2) as usize, number(elf, 60, 2) as usize);
    let section = |i: usize| &elf[table + i * size..][..size];
    for i in 0..count {
        let header = section(i);
        if number(header, 4, 4) != 2 {
            continue;
        }
        let names = number(section(number(header, 40, 4) as usize), 24, 8) as usize;
        let (offset, bytes) = (number(header, 24, 8) as usize, number(header, 32, 8) as usize);
        for entry in elf[offset..offset + bytes].chunks_exact(24) {
            // STT_FUNC, or STT_NOTYPE as assembler labels are.
            if !matches!(entry[4] & 15, 0 | 2) {
                continue;
            }
            let name = &elf[names + number(entry, 0, 4) as usize..];
            let name = &name[..name.iter().position(|b| *b == 0).expect("the end of a name")];
            symbols.push((String::from_utf8_lossy(name).into_owned(), number(entry, 8, 8), number(entry, 16, 8)));
        }
    }
    symbols
}

/// The entry saves four vector registers of the program, and the code must not change another. What only puts
/// the message of a panic together may: nothing goes on after a panic.
fn check_vectors(elf: &[u8]) {
    use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, Register};
    let mut info = InstructionInfoFactory::new();
    let mut checked = 0;
    for (name, address, size) in symbols(elf) {
        if size == 0 || name.contains("core3fmt") || name.contains("core3str5count") {
            continue;
        }
        let code = &image(elf)[(address - CODE_BASE) as usize..][..size as usize];
        for instruction in &mut Decoder::with_ip(64, code, address, DecoderOptions::NONE) {
            for used in info.info(&instruction).used_registers() {
                let register = used.register();
                let saved = (Register::XMM0..=Register::XMM3).contains(&register) || register.is_gpr();
                let vector = register.is_vector_register() || register.is_st() || register.is_mm() || register.is_k();
                assert!(saved || !vector, "{name} uses {register:?}, which the shim's entry does not save");
            }
            checked += 1;
        }
    }
    assert!(checked > 1000, "the shim's symbols have no sizes");
}

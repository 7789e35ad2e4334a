//! How busy a recorder is: the queuing model of Publishing, §5.
//!
//! Nodes are sources of short messages (a system call, 128 bytes), long ones (an access to a disk,
//! 1024 bytes) and checkpoint messages (1024 bytes). Each goes through the network, the recorder's
//! processor, and one of its disks; the acknowledgement goes back through the network. A process is
//! checkpointed when its published messages exceed its checkpoint, so checkpoints send as many bytes
//! as messages do.

use crate::protocols::rng::Rng;

/// What one node sends (table 5.2).
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Accesses to disks in a second.
    pub disk_accesses: f64,
    /// System calls in a second.
    pub system_calls: f64,
}

/// The four operating points of table 5.2.
pub const OPERATING_POINTS: [(&str, Load); 4] = [
    ("maximum load average", Load { disk_accesses: 19.0, system_calls: 106.0 }),
    ("maximum disk access rate", Load { disk_accesses: 43.0, system_calls: 111.0 }),
    ("maximum system call rate", Load { disk_accesses: 5.0, system_calls: 860.0 }),
    ("mean of all parameters", Load { disk_accesses: 13.0, system_calls: 118.0 }),
];

/// Table 5.1, in seconds and bytes.
#[derive(Clone, Copy, Debug)]
pub struct Hardware {
    /// Between two packets at a network interface.
    pub interpacket: f64,
    /// Bytes in a second.
    pub network: f64,
    /// Before a disk transfers.
    pub disk_latency: f64,
    /// Bytes in a second.
    pub disk: f64,
    /// For the processor to handle a packet.
    pub packet: f64,
    /// How many disks.
    pub disks: usize,
    /// Messages are collected to writes of so many bytes; 0 writes each by itself.
    pub write_bytes: u64,
}

impl Hardware {
    /// Of table 5.1. (The text has a 3 Mb/s Ethernet, the table 10 Mb/s.)
    pub const BERKELEY: Self = Self {
        interpacket: 1.6e-3,
        network: 10e6 / 8.0,
        disk_latency: 3e-3,
        disk: 2e6,
        packet: 0.8e-3,
        disks: 1,
        write_bytes: 0,
    };

    /// 10 Gb/s, one core at 2 µs a packet, one NVMe disk with 64 kB group commits.
    pub const TODAY: Self = Self {
        interpacket: 0.1e-6,
        network: 10e9 / 8.0,
        disk_latency: 30e-6,
        disk: 2e9,
        packet: 2e-6,
        disks: 1,
        write_bytes: 65_536,
    };
}

/// Shares of time in which things were busy; 1 and more is saturated.
#[derive(Clone, Copy, Debug)]
pub struct Utilisation {
    /// The network interface.
    pub network: f64,
    /// The recorder's processor.
    pub processor: f64,
    /// Its disks.
    pub disk: f64,
    /// Most bytes that waited in the recorder.
    pub queued_bytes: f64,
}

impl Utilisation {
    /// Of what is busiest.
    pub fn most(&self) -> f64 {
        self.network.max(self.processor).max(self.disk)
    }
}

/// Simulates so many packets at the recorder of so many nodes.
const PACKETS: usize = 20_000;

/// Utilisation with Poisson arrivals. What is asked of a saturated part is reported, not what it
/// manages.
pub fn utilisation(hardware: &Hardware, load: &Load, nodes: usize, seed: u64) -> Utilisation {
    let mut rng = Rng::new(seed);
    let bytes = load.system_calls * 128.0 + load.disk_accesses * 1024.0;
    let checkpoints = bytes / 1024.0;
    let each = load.system_calls + load.disk_accesses + checkpoints;
    let rate = each * nodes as f64;
    let (mut now, mut network, mut processor, mut disk) = (0.0, 0.0, 0.0, 0.0);
    let (mut network_free, mut processor_free) = (0.0f64, 0.0f64);
    let mut disks_free = vec![0.0f64; hardware.disks];
    let (mut buffered, mut most_queued) = (0u64, 0.0f64);
    for _ in 0..PACKETS {
        now += -rng.unit().ln() / rate;
        let size: u64 = if rng.unit() * each < load.system_calls { 128 } else { 1024 };
        // The packet, and an acknowledgement that shares the interface's next slot.
        let transfer = hardware.interpacket + (size + 64) as f64 / hardware.network;
        network += transfer;
        network_free = network_free.max(now) + transfer;
        processor += hardware.packet;
        processor_free = processor_free.max(network_free) + hardware.packet;
        buffered += size;
        if buffered >= hardware.write_bytes.max(1) {
            let write = hardware.disk_latency + buffered as f64 / hardware.disk;
            disk += write / hardware.disks as f64;
            let next = disks_free.iter_mut().min_by(|a, b| a.total_cmp(b)).expect("there is a disk");
            *next = next.max(processor_free) + write;
            let waiting = (*next - now).max(0.0) * rate * (bytes + bytes) / each;
            most_queued = most_queued.max(waiting);
            buffered = 0;
        }
    }
    Utilisation { network: network / now, processor: processor / now, disk: disk / now, queued_bytes: most_queued }
}

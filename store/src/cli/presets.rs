//! The papers' experiments.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{Answer, workloads};
use crate::protocols::family;
use crate::protocols::group::{Broadcasts, Primitive, Routine, broadcasts, cost};
use crate::protocols::process::Workload;
use crate::protocols::sender;
use crate::protocols::sim::recorder_load::{Hardware, Load, OPERATING_POINTS, Utilisation, utilisation};
use crate::protocols::sim::{Costs, Crash, Plan, Victim, Violation, run};

/// What an experiment has to say: a table, and its rows.
type Experiment = (String, Vec<Value>);

/// Which experiment.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum Preset {
    /// Publishing, §5: utilisation of network, recorder and disks at four operating points
    Publishing,
    /// The same with hardware of today: how many nodes one store carries
    PublishingToday,
    /// Johnson, tables 3.5 to 3.7 and 4.3: log sizes, how messages were sent, and what logging cost
    Johnson,
    /// Elnozahy, §5: one failure, and one during the recovery from another; both recoveries
    Elnozahy,
    /// ISIS, figures 2 and 3: messages between sites for one broadcast of each primitive, and how many in a second
    Isis,
}

impl Preset {
    pub(super) fn run(self, seed: u64) -> Answer {
        let (text, rows) = match self {
            Self::Publishing => publishing(seed),
            Self::PublishingToday => publishing_today(seed),
            Self::Isis => isis(),
            Self::Johnson | Self::Elnozahy => {
                let answer = if matches!(self, Self::Johnson) { johnson(seed) } else { elnozahy(seed) };
                match answer {
                    Ok(answer) => answer,
                    Err(violation) => return Answer { text: format!("{violation}\n"), json: Value::Null, bad: true },
                }
            }
        };
        Answer { text, json: Value::Array(rows), bad: false }
    }
}

fn publishing(seed: u64) -> Experiment {
    let mut text = String::from("utilisation in percent; * is saturated\n");
    let _ = writeln!(
        text,
        "{:<28} {:>5} {:>5} {:>6} {:>8} {:>9} {:>10} {:>9}",
        "operating point", "nodes", "disks", "buffer", "network", "processor", "disk", "queued kB"
    );
    let mut rows = Vec::new();
    for (name, load) in OPERATING_POINTS {
        for nodes in 1..=5 {
            for (disks, buffered) in [(1, false), (2, false), (3, false), (1, true)] {
                let hardware = Hardware { disks, write_bytes: if buffered { 4096 } else { 0 }, ..Hardware::BERKELEY };
                let used = utilisation(&hardware, &load, nodes, seed);
                let show = |u: f64| if u >= 0.995 { format!("{:.0}*", 100.0 * u) } else { format!("{:.0}", 100.0 * u) };
                let buffer = if buffered { "4k" } else { "none" };
                let _ = writeln!(
                    text,
                    "{name:<28} {nodes:>5} {disks:>5} {buffer:>6} {:>8} {:>9} {:>10} {:>9.0}",
                    show(used.network),
                    show(used.processor),
                    show(used.disk),
                    used.queued_bytes / 1e3
                );
                rows.push(json!({ "point": name, "nodes": nodes, "disks": disks, "buffered": buffered, "network": used.network, "processor": used.processor, "disk": used.disk }));
            }
        }
    }
    let _ = writeln!(
        text,
        "\nnodes, up to 5, with which all is below saturation; of all system calls, every so many-th is a message"
    );
    let _ = writeln!(
        text,
        "{:<28} {:>5} {:>9} {:>10} {:>7} {:>7} {:>7} {:>8}",
        "operating point", "every", "network", "processor", "1 disk", "2 disks", "3 disks", "1, 4k"
    );
    for (name, load) in OPERATING_POINTS {
        for every in [1, 6] {
            let load = Load { system_calls: load.system_calls / f64::from(every), ..load };
            let fits = |hardware: Hardware, of: fn(&Utilisation) -> f64| {
                (1..=5).take_while(|&nodes| of(&utilisation(&hardware, &load, nodes, seed)) < 0.995).count()
            };
            let with = |disks, write_bytes| Hardware { disks, write_bytes, ..Hardware::BERKELEY };
            let network = fits(with(1, 0), |used| used.network);
            let processor = fits(with(1, 0), |used| used.processor);
            let disks =
                [with(1, 0), with(2, 0), with(3, 0), with(1, 4096)].map(|hardware| fits(hardware, |used| used.disk));
            let [one, two, three, buffered] = disks;
            let _ = writeln!(
                text,
                "{name:<28} {every:>5} {network:>9} {processor:>10} {one:>7} {two:>7} {three:>7} {buffered:>8}"
            );
            rows.push(json!({ "point": name, "message_every_calls": every, "nodes_network": network, "nodes_processor": processor, "nodes_disks": disks }));
        }
    }
    (text, rows)
}

fn publishing_today(seed: u64) -> Experiment {
    let mut text = String::from("nodes that one store carries below 90 % of everything, with hardware of today\n");
    let mut rows = Vec::new();
    for (name, load) in OPERATING_POINTS {
        let fits = |nodes: usize| utilisation(&Hardware::TODAY, &load, nodes, seed).most() < 0.9;
        let (mut low, mut high) = (1, 2);
        while fits(high) && high < 4096 {
            (low, high) = (high, high * 2);
        }
        while high - low > 1 {
            let middle = (low + high) / 2;
            if fits(middle) { low = middle } else { high = middle }
        }
        let used = utilisation(&Hardware::TODAY, &load, low, seed);
        let first = if used.network >= used.processor && used.network >= used.disk {
            "network"
        } else if used.processor >= used.disk {
            "processor"
        } else {
            "disk"
        };
        let _ = writeln!(text, "{name:<28} {low:>6} nodes; the {first} is full first");
        rows.push(json!({ "point": name, "nodes": low, "full_first": first }));
    }
    (text, rows)
}

fn plan<O>(workload: Workload, options: O, seed: u64, costs: Costs, crashes: Vec<Crash>) -> Plan<O> {
    let down_at_most = crashes.len().max(1);
    Plan {
        seed,
        workload,
        options,
        crashes,
        partitions: Vec::new(),
        down_at_most,
        must_recover: true,
        loss: 0,
        repeat: 0,
        costs,
        steps_max: 10_000_000,
    }
}

fn johnson(seed: u64) -> Result<Experiment, Violation> {
    let mut text = String::from(
        "8 processes; messages and kB logged for each (table 3.6); messages sent: percent with no RSN pending,\n\
         with RSNs piggybacked, delayed for RSNs (table 3.7)\n",
    );
    let _ = writeln!(
        text,
        "{:<10} {:>5} {:>9} {:>6} {:>8} {:>6} {:>16} {:>17}",
        "program", "size", "messages", "paper", "kB/node", "paper", "ours", "paper"
    );
    let mut rows = Vec::new();
    for Program { name, size, messages, kilobytes, pending: [free, piggybacked, delayed], seconds, .. } in PROGRAMS {
        // Two packets and four times a processor are an RSN's round trip of 550 µs (§3.4.1).
        let costs = Costs { link: 90, jitter: 20, link_bytes_per_us: 1, processor: 50, ..Costs::default() };
        let named = workloads::named(name, 8).expect("a known name");
        // Gauss has a step for each row. The others have as many questions and answers as the paper's messages.
        let rounds = if name == "gauss" { size } else { (8.0 * messages / 14.0) as u32 };
        let workload = Workload {
            hops: if name == "gauss" { 4 * rounds } else { 2 * rounds - 1 },
            bytes: (1e3 * kilobytes / messages) as u32,
            computing: (1e6 * seconds / f64::from(rounds)) as u32,
            ..named
        };
        let options = sender::Options { checkpoint_every: 0, ..Default::default() };
        let plan = plan(workload, options, seed, costs, Vec::new());
        let report = run::<sender::Unit>(&plan)?;
        let all = report.sent_free + report.sent_piggybacked + report.held;
        let [none, piggy, delay] =
            [report.sent_free, report.sent_piggybacked, report.held].map(|n| 100.0 * n as f64 / all as f64);
        let (sent, kept) = (report.messages as f64 / 8.0, report.log_bytes as f64 / 8e3);
        let _ = writeln!(
            text,
            "{name:<10} {size:>5} {sent:>9.0} {messages:>6.0} {kept:>8.1} {kilobytes:>6.1} {none:>6.1} {piggy:>4.1} {delay:>4.1} {free:>7.1} {piggybacked:>4.1} {delayed:>4.1}"
        );
        rows.push(json!({ "program": name, "size": size, "messages_per_node": sent, "kb_per_node": kept, "none_pending": none, "piggybacked": piggy, "delayed": delay }));
    }
    text.push_str(&programs(&mut rows));
    Ok((text, rows))
}

/// Johnson, tables 3.5, 3.6, 3.7 and 4.3.
#[derive(Debug)]
struct Program {
    name: &'static str,
    size: u32,
    /// Average for each of 8 nodes (table 3.6).
    messages: f64,
    kilobytes: f64,
    /// Percent of messages sent with no RSN pending, with RSNs piggybacked, and delayed (table 3.7).
    pending: [f64; 3],
    /// Seconds without logging, and more with sender-based logging (table 3.5), and with optimistic
    /// logging (table 4.3).
    seconds: f64,
    sender: f64,
    optimistic: f64,
}

const fn program(
    name: &'static str,
    size: u32,
    [messages, kilobytes]: [f64; 2],
    pending: [f64; 3],
    [seconds, sender, optimistic]: [f64; 3],
) -> Program {
    Program { name, size, messages, kilobytes, pending, seconds, sender, optimistic }
}

const PROGRAMS: [Program; 9] = [
    program("nqueens", 12, [8.0, 1.9], [42.9, 44.4, 12.7], [5.98, 0.01, 0.01]),
    program("nqueens", 13, [8.0, 1.9], [41.3, 46.0, 12.7], [34.60, 0.01, 0.12]),
    program("nqueens", 14, [8.0, 1.9], [41.3, 46.0, 12.7], [208.98, 0.01, 0.09]),
    program("tsp", 12, [43.0, 5.5], [19.9, 62.4, 17.6], [5.19, 0.11, 0.02]),
    program("tsp", 14, [48.0, 6.1], [22.3, 63.5, 14.2], [16.13, 0.27, 0.32]),
    program("tsp", 16, [59.0, 7.3], [33.0, 58.3, 8.7], [841.57, 2.53, 1.08]),
    program("gauss", 100, [514.0, 95.4], [20.7, 30.0, 49.2], [10.74, 1.67, 0.36]),
    program("gauss", 200, [1113.0, 292.8], [29.4, 28.6, 42.0], [66.40, 4.70, 1.48]),
    program("gauss", 300, [1802.0, 593.7], [29.0, 31.0, 40.0], [217.01, 7.05, 1.54]),
];

/// Overheads from measured costs: every message takes the sender 126 µs more, and 151 µs for each kB that is
/// copied; the receiver 142 µs; and one that is delayed waits for an RSN's round trip of 550 µs (§3.4.1).
/// With optimistic logging the receiver copies it, which takes from 27 µs to 162 µs for a packet of
/// 1 kB (§4.6.1). Messages follow each other.
fn programs(rows: &mut Vec<Value>) -> String {
    let mut text = String::from(
        "\nseconds more with logging, from messages and the costs of one (§3.4.1, §4.6.1); what was measured\n",
    );
    let _ = writeln!(
        text,
        "{:<10} {:>5} {:>9} {:>8} {:>9} {:>12} {:>10}",
        "program", "size", "messages", "sender", "table 3.5", "optimistic", "table 4.3"
    );
    for Program { name, size, messages, kilobytes, pending: [_, _, delayed], sender, optimistic, .. } in PROGRAMS {
        let all = 8.0 * messages;
        let ours = all * (268e-6 + delayed / 100.0 * 550e-6) + 8.0 * kilobytes * 151e-6;
        let copied = all * (27e-6 + (162e-6 - 27e-6) * (kilobytes / messages).min(1.0));
        let _ = writeln!(
            text,
            "{name:<10} {size:>5} {all:>9.0} {ours:>8.2} {sender:>9.2} {copied:>12.2} {optimistic:>10.2}"
        );
        rows.push(json!({ "program": name, "size": size, "messages": all, "sender_overhead_s": ours, "table_3_5_s": sender, "optimistic_overhead_s": copied, "table_4_3_s": optimistic }));
    }
    text
}

fn elnozahy(seed: u64) -> Result<Experiment, Violation> {
    let mut text = String::from(
        "8 processes, f = 2; detection and restoring a state take 2.5 s (§5: about five seconds for two)\n",
    );
    let _ = writeln!(
        text,
        "{:<34} {:<12} {:>14} {:>18} {:>9}",
        "experiment", "recovery", "recovering ms", "blocked ms/process", "packets"
    );
    let mut rows = Vec::new();
    let workload =
        Workload { first: 4, hops: 100, forks: 0, outputs: 20, ..workloads::named("random", 8).expect("a known name") };
    // On 155 Mb/s ATM a message took about a millisecond then.
    let costs = Costs {
        link: 800,
        jitter: 400,
        link_bytes_per_us: 19,
        disk: 20_000,
        restart: 2_500_000,
        detect: 500_000,
        ..Costs::default()
    };
    let first = Crash { after_step: 600, victim: Victim::Node(0) };
    // Recovery gathers soon after the restart; the second process fails while that is going on.
    for (name, second) in [("one failure", None), ("one during the recovery of another", Some(1))] {
        for blocking in [false, true] {
            let options = family::Options { failures: 2, checkpoint_every: 50, blocking, bug: None };
            let with = |crashes: Vec<Crash>| run::<family::Node>(&plan(workload, options, seed, costs, crashes));
            let mut report = with(vec![first])?;
            if let Some(node) = second {
                // The step at which the second failure makes the recovery longest.
                for after_step in (610..5_000).step_by(60) {
                    let both = with(vec![first, Crash { after_step, victim: Victim::Node(node) }])?;
                    if both.recovering > report.recovering {
                        report = both;
                    }
                }
            }
            let kind = if blocking { "blocking" } else { "new" };
            let live = 8 - report.crashes;
            let (recovering, blocked) = (report.recovering as f64 / 1e3, report.blocked as f64 / 1e3 / live as f64);
            let _ = writeln!(text, "{name:<34} {kind:<12} {recovering:>14.1} {blocked:>18.1} {:>9}", report.packets);
            rows.push(json!({ "experiment": name, "recovery": kind, "recovering_ms": recovering, "blocked_ms_per_live_process": blocked, "packets": report.packets }));
        }
    }
    Ok((text, rows))
}

fn isis() -> Experiment {
    let mut text = String::from(
        "messages between sites: one after the other before a remote delivery, and altogether for 2, 4 and 8 sites;\n\
         latency at 16 ms for each and 10 ms within a site at either end (fig. 3)\n",
    );
    let _ = writeln!(
        text,
        "{:<28} {:>10} {:>6} {:>6} {:>6} {:>9}   paper (§7)",
        "primitive", "in a row", 2, 4, 8, "latency"
    );
    let mut rows = Vec::new();
    for (name, primitive, safe, paper) in [
        ("CBCAST", Primitive::Cbcast, false, "1"),
        ("ABCAST as printed", Primitive::Abcast, false, "3, 70 ms"),
        ("ABCAST, additional phase", Primitive::Abcast, true, "-"),
        ("GBCAST", Primitive::Gbcast, false, "3 or 5"),
    ] {
        let costs = [2, 4, 8].map(|sites| cost(primitive, sites, safe));
        let [two, four, eight] = costs.map(|cost| cost.messages);
        let deep = costs[2].deep;
        let latency = 16 * deep + 20;
        let _ = writeln!(text, "{name:<28} {deep:>10} {two:>6} {four:>6} {eight:>6} {latency:>6} ms   {paper}");
        rows.push(
            json!({ "primitive": name, "in_a_row": deep, "latency_ms": latency, "messages_2": two, "messages_4": four, "messages_8": eight }),
        );
    }
    text.push_str(&throughput(&mut rows));
    text.push_str(&routines(&mut rows));
    (text, rows)
}

/// Table I, for what there is of the toolkit.
fn routines(rows: &mut Vec<Value>) -> String {
    let mut text = String::from("\nbroadcasts for a routine of the toolkit (table I), counted in a group of 4\n");
    let _ = writeln!(
        text,
        "{:<28} {:>6} {:>6} {:>6} {:>15}   paper",
        "routine", "CBCAST", "ABCAST", "GBCAST", "state transfers"
    );
    for (name, routine, paper) in [
        ("update, in causal order", Routine::Update(Primitive::Cbcast), "1 CBCAST"),
        ("update, in one order", Routine::Update(Primitive::Abcast), "1 ABCAST"),
        ("coord_cohort", Routine::CoordinatorCohort, "1 CBCAST to invoke, 1 to reply"),
        ("conf_update", Routine::Configuration, "1 GBCAST"),
        ("pg_leave", Routine::Leave, "1 GBCAST"),
        ("join_and_xfer", Routine::Join, "1 CBCAST, 1 GBCAST, 1 reply, 1 transfer"),
    ] {
        let Broadcasts { cbcasts, abcasts, gbcasts, transfers } = broadcasts(routine, 4);
        let _ = writeln!(text, "{name:<28} {cbcasts:>6} {abcasts:>6} {gbcasts:>6} {transfers:>15}   {paper}");
        rows.push(
            json!({ "routine": name, "cbcasts": cbcasts, "abcasts": abcasts, "gbcasts": gbcasts, "transfers": transfers }),
        );
    }
    text
}

/// Figure 2, as far as the text tells of it: a sender that waits for each ABCAST is busy for 30 to 35 % of the
/// time. That says what a message takes its processor, and so how many CBCASTs it can send that wait for nothing.
fn throughput(rows: &mut Vec<Value>) -> String {
    let mut text = String::from(
        "\nbroadcasts in a second if the sender of ABCASTs, one after the other, is busy for a third of the time\n",
    );
    let _ = writeln!(
        text,
        "{:<6} {:>14} {:>8} {:>8} {:>20}",
        "sites", "ms for a packet", "ABCAST", "CBCAST", "others busy, CBCAST"
    );
    for sites in [2, 4, 8] {
        let (abcast, cbcast) = (cost(Primitive::Abcast, sites, false), cost(Primitive::Cbcast, sites, false));
        let latency = f64::from(16 * abcast.deep + 20);
        let packet = latency / 3.0 / f64::from(abcast.sender);
        let (one, other) = (1e3 / latency, 1e3 / packet / f64::from(cbcast.sender));
        let busy = 100.0 * f64::from(cbcast.other) / f64::from(cbcast.sender);
        let _ = writeln!(text, "{sites:<6} {packet:>15.1} {one:>8.0} {other:>8.0} {busy:>18.0} %");
        rows.push(json!({ "sites": sites, "packet_ms": packet, "abcasts_per_s": one, "cbcasts_per_s": other, "others_busy_percent": busy }));
    }
    text
}

//! Regions on the program: many namespaces in one file, apart in every respect, and seen by foreign tools.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::FileExt;

use common::{Bench, Run, Server, loop_device, noise, tool, tool_command};
use serde_json::Value;

const MIB: usize = 1 << 20;
const KEY: [&str; 2] = ["--key-file", "vault.key"];
const OTHER: [&str; 2] = ["--key-file", "other.key"];

/// `region.img` of 32 MiB with `a` (4 MiB, vault.key) and `b` (4 MiB, other.key).
fn region() -> Bench {
    let bench = Bench::new();
    bench.secret("other.key", &[9; 32]);
    bench.run(&["region", "create", "region.img", "--size", "32M"]).succeeds();
    bench.run(&["format", "region.img#a", "--size", "4M", KEY[0], KEY[1]]).succeeds();
    bench.run(&["format", "region.img#b", "--size", "4M", OTHER[0], OTHER[1]]).succeeds();
    bench
}

fn list(bench: &Bench) -> Value {
    serde_json::from_str(&bench.run(&["region", "list", "region.img", "--json"]).succeeds().stdout).unwrap()
}

fn serve(bench: &Bench, name: &str, key: [&str; 2]) -> Server {
    let socket = bench.path(&format!("{name}.sock"));
    let path = format!("region.img#{name}");
    Server::start(
        bench.command(&["serve", &path, key[0], key[1], "--socket", socket.to_str().unwrap()]),
        socket.clone(),
    )
}

/// Runs `args`, which must fail so and leave `region.img` as it is.
#[track_caller]
fn refused(bench: &Bench, args: &[&str], code: i32, words: &[&str]) {
    let before = fs::read(bench.path("region.img")).unwrap();
    bench.run(args).fails(code, words);
    assert!(fs::read(bench.path("region.img")).unwrap() == before, "{args:?} changed the region");
}

#[test]
fn namespaces_of_a_region_are_served_side_by_side_and_share_no_ciphertext() {
    let bench = region();
    let json = list(&bench);
    assert_eq!(json["namespaces"][0]["start"], 2 << 20);
    assert_eq!(json["namespaces"][1]["start"], 8 << 20);
    assert_eq!(json["namespaces"][1]["label"], "b");
    let (a, b) = (serve(&bench, "a", KEY), serve(&bench, "b", OTHER));
    let plaintext = noise(1, 4 * MIB);
    fs::write(bench.path("in.img"), &plaintext).unwrap();
    for (server, name) in [(&a, "a"), (&b, "b")] {
        tool("nbdcopy", &[bench.path("in.img").to_str().unwrap(), &server.uri(name)]);
    }
    for (server, name) in [(&a, "a"), (&b, "b")] {
        tool("nbdcopy", &[&server.uri(name), bench.path("out.img").to_str().unwrap()]);
        assert!(fs::read(bench.path("out.img")).unwrap() == plaintext);
    }
    // While they are served: others may be looked at, added and served, these may not be changed.
    bench.run(&["info", "region.img#a"]).succeeds();
    bench.run(&["format", "region.img#c", "--size", "2M", KEY[0], KEY[1]]).succeeds();
    refused(&bench, &["remove", "region.img#a", "--yes"], 5, &["busy"]);
    refused(&bench, &["key", "add", "region.img#a", KEY[0], KEY[1], "--new-key-file", "other.key"], 5, &["busy"]);
    a.stop();
    b.stop();
    let bytes = fs::read(bench.path("region.img")).unwrap();
    let blocks = |start: usize| bytes[start..start + 4 * MIB].chunks(16).map(<[u8]>::to_vec).collect::<HashSet<_>>();
    let (a, b) = (blocks(4 * MIB), blocks(10 * MIB));
    assert_eq!(a.len(), 4 * MIB / 16);
    assert!(a.is_disjoint(&b), "the same plaintext under two keys at two places");
}

#[test]
fn one_key_opens_one_namespace_and_tells_nothing_of_another() {
    let bench = region();
    refused(&bench, &["dmtable", "region.img#b", KEY[0], KEY[1]], 2, &["none of 1 key slots"]);
    // The first tweak is the place in the region.
    let table = bench.run(&["dmtable", "region.img#b", OTHER[0], OTHER[1]]).succeeds().stdout;
    assert!(table.contains(" 20480 region.img#b 20480 1 sector_size:4096"), "{table}");
    // A namespace that is copied to another place of the region is noticed.
    let file = fs::File::options().read(true).write(true).open(bench.path("region.img")).unwrap();
    let mut header = vec![0; 2 * MIB];
    file.read_exact_at(&mut header, 2 << 20).unwrap();
    file.write_all_at(&header, 8 << 20).unwrap();
    refused(&bench, &["dmtable", "region.img#b", KEY[0], KEY[1]], 3, &["relocated", "2097152", "8388608"]);
}

#[test]
fn foreign_tools_see_the_partitions() {
    let bench = region();
    let image = bench.path("region.img");
    let sfdisk: Value = serde_json::from_str(&tool("sfdisk", &["--json", image.to_str().unwrap()]).stdout).unwrap();
    let partitions = sfdisk["partitiontable"]["partitions"].as_array().unwrap();
    assert_eq!((partitions.len(), &sfdisk["partitiontable"]["label"]), (2, &Value::from("gpt")));
    for (partition, (name, start)) in partitions.iter().zip([("a", 4096), ("b", 16384)]) {
        assert_eq!(
            (&partition["name"], &partition["start"], &partition["size"]),
            (&name.into(), &start.into(), &12288.into())
        );
        assert_eq!(partition["type"], "9D1F6B0E-5C4A-4F1B-8E57-3A2C64F7D0B1");
    }
    let verdict = tool("sgdisk", &["--verify", image.to_str().unwrap()]).stdout;
    assert!(verdict.contains("No problems found"), "{verdict}");
    // What they make is taken up: a partition of our type, and one of somebody else's.
    tool(
        "sgdisk",
        &[
            "-n",
            "5:28672:+4M",
            "-t",
            "5:9D1F6B0E-5C4A-4F1B-8E57-3A2C64F7D0B1",
            "-c",
            "5:theirs",
            image.to_str().unwrap(),
        ],
    );
    tool("sgdisk", &["-n", "7:40960:+2M", "-c", "7:linux", image.to_str().unwrap()]);
    bench.run(&["format", "region.img#theirs", KEY[0], KEY[1]]).succeeds();
    bench.run(&["key", "test", "region.img#theirs", KEY[0], KEY[1]]).succeeds();
    let json = list(&bench);
    assert_eq!(
        (&json["namespaces"][2]["number"], &json["namespaces"][2]["size_bytes"]),
        (&5.into(), &(2 << 20).into())
    );
    assert_eq!((&json["others"][0]["name"], &json["others"][0]["number"]), (&"linux".into(), &7.into()));
    bench.run(&["info", "region.img#linux"]).fails(1, &["no namespace \"linux\""]);
    bench.run(&["remove", "region.img#a", "--yes"]).succeeds();
    let verdict = tool("sgdisk", &["--verify", image.to_str().unwrap()]).stdout;
    assert!(verdict.contains("No problems found"), "{verdict}");
    assert_eq!(list(&bench)["others"][0]["number"], 7, "numbers stay");
}

#[test]
fn a_namespace_is_removed_and_its_keys_destroyed() {
    let bench = region();
    let remove = |input: &[u8]| Run::with_input(bench.command(&["remove", "region.img#a"]), input);
    remove(b"b\n").fails(1, &["type its label (a)", "nothing was erased"]);
    assert!(remove(b"a\n").succeeds().stdout.contains("removed namespace a"));
    let bytes = fs::read(bench.path("region.img")).unwrap();
    assert!(bytes[2 * MIB..4 * MIB].iter().all(|&byte| byte == 0));
    assert!(bytes[8 * MIB..8 * MIB + 8] == *b"DAXCRYPT", "the other one is not touched");
    bench.run(&["info", "region.img#a"]).fails(1, &["no namespace \"a\"", "region list region.img"]);
    bench.run(&["remove", "region.img"]).fails(1, &["REGION#NAME"]);
    // Its place is the first that fits.
    bench.run(&["format", "region.img#c", "--size", "3M", KEY[0], KEY[1]]).succeeds();
    assert_eq!(list(&bench)["namespaces"][0]["name"], "c");
    assert_eq!(list(&bench)["namespaces"][0]["start"], 2 << 20);
}

#[test]
fn a_full_region_and_bad_names_are_told() {
    let bench = region();
    let format = |name: &str, size: &str, words: &[&str]| {
        refused(&bench, &["format", name, "--size", size, KEY[0], KEY[1]], 1, words);
    };
    format("region.img#c", "1G", &["bytes do not fit: 16777216 bytes are free: 16777216 bytes at byte 14680064"]);
    format("region.img#a", "1M", &["region.img#a already holds data"]);
    format(&format!("region.img#{}", "x".repeat(37)), "1M", &["37 UTF-16 units"]);
    refused(&bench, &["format", "region.img#c", KEY[0], KEY[1]], 1, &["say how large"]);
    refused(&bench, &["format", "region.img", KEY[0], KEY[1]], 1, &["already holds data", "GPT"]);
    refused(&bench, &["info", "region.img"], 3, &["GPT", "region.img#NAME", "region list"]);
    bench.run(&["region", "create", "small.img", "--size", "4M"]).fails(1, &["4194304 bytes is too small"]);
    assert!(!bench.path("small.img").exists());
    bench.run(&["region", "create", "region.img"]).fails(1, &["already holds data"]);
    bench.run(&["region", "list", "vault.key"]).fails(3, &["no GPT partition table"]);
    // A file with just that name is that file.
    bench.format("odd#name.img", "4M", &[]);
    bench.run(&["info", "odd#name.img"]).succeeds();
}

#[test]
fn a_damaged_primary_table_is_replaced_by_the_backup_and_said() {
    let bench = region();
    let image = bench.path("region.img");
    let file = fs::File::options().write(true).open(&image).unwrap();
    file.write_all_at(&[0; 512], 512).unwrap();
    let run = bench.run(&["info", "region.img#b"]).succeeds();
    assert!(
        run.stderr.contains("warning") && run.stderr.contains("primary partition table is not usable"),
        "{}",
        run.stderr
    );
    serve(&bench, "b", OTHER).stop();
    // The next change mends it.
    bench.run(&["format", "region.img#c", "--size", "1M", KEY[0], KEY[1]]).succeeds();
    assert!(tool("sgdisk", &["--verify", image.to_str().unwrap()]).stdout.contains("No problems found"));
    file.write_all_at(&[0xff; 512], 512).unwrap();
    file.write_all_at(&[0xff; 512], (32 << 20) - 512).unwrap();
    bench.run(&["info", "region.img#b"]).fails(3, &["GPT"]);
}

#[test]
fn partitions_that_overlap_are_refused() {
    let bench = region();
    let image = bench.path("region.img");
    // Neither sgdisk nor sfdisk makes one, so the table is edited: b begins one sector inside of a.
    let mut bytes = fs::read(&image).unwrap();
    let last = bytes.len() - 512;
    for (header, entries) in [(512, 1024), (last, last - 32 * 512)] {
        bytes[entries + 128 + 32..entries + 128 + 40].copy_from_slice(&16383_u64.to_le_bytes());
        let crc = crc32fast::hash(&bytes[entries..entries + 128 * 128]);
        bytes[header + 88..header + 92].copy_from_slice(&crc.to_le_bytes());
        bytes[header + 16..header + 20].fill(0);
        let crc = crc32fast::hash(&bytes[header..header + 92]);
        bytes[header + 16..header + 20].copy_from_slice(&crc.to_le_bytes());
    }
    fs::write(&image, bytes).unwrap();
    let found = Run::of(tool_command("sgdisk", &["--verify", image.to_str().unwrap()]));
    assert!(found.stdout.contains("overlap"), "sgdisk agrees: {}", found.stdout);
    for args in [&["info", "region.img#a"][..], &["region", "list", "region.img"], &["remove", "region.img#b", "--yes"]]
    {
        refused(&bench, args, 3, &["partitions 1 and 2 overlap"]);
    }
}

#[test]
fn a_namespace_of_a_region_grows_and_shrinks_with_its_partition() {
    let bench = region();
    let resize =
        |name: &str, size: &str, key: [&'static str; 2]| bench.run(&["resize", name, "--size", size, key[0], key[1]]);
    resize("region.img#b", "8M", OTHER).succeeds();
    assert_eq!(list(&bench)["namespaces"][1]["len_bytes"], 10 << 20);
    resize("region.img#a", "8M", KEY).fails(1, &["do not fit", "bytes are free"]);
    resize("region.img#b", "2M", OTHER).fails(1, &["shrinking loses data", "--force"]);
    bench.run(&["resize", "region.img#b", "--size", "2M", "--force", OTHER[0], OTHER[1]]).succeeds();
    let json = list(&bench);
    assert_eq!(
        (&json["namespaces"][1]["len_bytes"], &json["namespaces"][1]["size_bytes"]),
        (&(4 << 20).into(), &(2 << 20).into())
    );
    bench.run(&["key", "test", "region.img#b", OTHER[0], OTHER[1]]).succeeds();
}

#[test]
fn a_file_grows_and_shrinks_and_keeps_its_data() {
    let bench = Bench::new();
    bench.format("vault.img", "4M", &[]);
    let plaintext = noise(2, 4 * MIB);
    fs::write(bench.path("in.img"), &plaintext).unwrap();
    let server = bench.serve("vault.img", &[]);
    tool("nbdcopy", &[bench.path("in.img").to_str().unwrap(), &server.uri("vault")]);
    let grow = ["resize", "vault.img", "--size", "6M", KEY[0], KEY[1]];
    bench.run(&grow).fails(5, &["busy"]);
    server.stop();
    assert!(bench.run(&grow).succeeds().stdout.contains("6 MiB (was 4 MiB)"));
    assert_eq!(fs::metadata(bench.path("vault.img")).unwrap().len(), 8 << 20);
    let size = |server: &Server| tool("nbdinfo", &["--size", &server.uri("vault")]).stdout.trim().to_owned();
    let server = bench.serve("vault.img", &[]);
    assert_eq!(size(&server), (6 << 20).to_string());
    tool("nbdcopy", &[&server.uri("vault"), bench.path("out.img").to_str().unwrap()]);
    assert!(fs::read(bench.path("out.img")).unwrap()[..4 * MIB] == plaintext);
    server.stop();
    bench.refused(&["resize", "vault.img", "--size", "1M", KEY[0], KEY[1]], 1, &["shrinking loses data"]);
    bench.refused(&["resize", "vault.img", "--size", "1000", "--force", KEY[0], KEY[1]], 1, &["not a multiple"]);
    bench.refused(&["resize", "vault.img", "--size", "1M", "--force", OTHER[0], "/dev/null"], 1, &["0 bytes"]);
    bench.run(&["resize", "vault.img", "--size", "1M", "--force", KEY[0], KEY[1]]).succeeds();
    // Without a size: all that there is.
    bench.run(&["resize", "vault.img", KEY[0], KEY[1]]).succeeds();
    let server = bench.serve("vault.img", &[]);
    assert_eq!(size(&server), (6 << 20).to_string());
    server.stop();
}

/// The commands that `--help` lists, and those below them.
fn commands_below(bench: &Bench, above: &[String], into: &mut Vec<Vec<String>>) {
    let args: Vec<&str> = above.iter().map(String::as_str).chain(["--help"]).collect();
    let help = bench.run(&args).succeeds().stdout;
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // A name is indented by two; what is indented more goes on with the line before.
    let names = listed.filter(|line| !line.starts_with("   ")).filter_map(|line| line.split_whitespace().next());
    for name in names.filter(|name| *name != "help") {
        let command = [above, &[name.to_owned()]].concat();
        commands_below(bench, &command, into);
        into.push(command);
    }
}

/// What bash offers for the last of `words`.
fn completed(bench: &Bench, words: &[&str]) -> String {
    let ask = format!(
        "source ./completions; COMP_WORDS=({}); COMP_CWORD={}; _daxcrypt daxcrypt \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\"; \
         echo \"${{COMPREPLY[@]}}\"",
        words.join(" "),
        words.len() - 1
    );
    let mut command = tool_command("bash", &["--norc", "-c", &ask]);
    command.current_dir(bench.dir.path());
    Run::of(command).succeeds().stdout
}

#[test]
fn bash_completes_commands_and_options() {
    let bench = Bench::new();
    fs::write(bench.path("completions"), bench.run(&["completions", "bash"]).succeeds().stdout).unwrap();
    assert_eq!(completed(&bench, &["daxcrypt", "resi"]).trim(), "resize");
    assert_eq!(completed(&bench, &["daxcrypt", "region", "cr"]).trim(), "create");
    let options = completed(&bench, &["daxcrypt", "resize", "--"]);
    for option in ["--size", "--control", "--force", "--key-file"] {
        assert!(options.split_whitespace().any(|word| word == option), "no {option} in {options}");
    }
    assert_eq!(completed(&bench, &["daxcrypt", "format", "--cipher", "aes-1"]).trim(), "aes-128-xts");
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    let bench = Bench::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = bench.run(&["completions", shell]).succeeds().stdout;
        assert!(script.contains("region") && script.contains("passphrase-command"), "{shell}");
    }
    bench.run(&["completions", "tcsh"]).fails(1, &["tcsh"]);
    fs::create_dir(bench.path("man")).unwrap();
    bench.run(&["man", "man"]).succeeds();
    let mut commands = Vec::new();
    commands_below(&bench, &[], &mut commands);
    assert!(commands.len() >= 30, "{commands:?}");
    for command in &commands {
        let page = format!("{}.1", [&["daxcrypt".to_owned()][..], command].concat().join("-"));
        let text = fs::read_to_string(bench.path("man").join(&page)).unwrap_or_default();
        for section in [".TH", ".SH NAME", ".SH SYNOPSIS"] {
            assert!(text.contains(section), "no {section} in {page}");
        }
    }
    assert_eq!(fs::read_dir(bench.path("man")).unwrap().count(), commands.len() + 1, "and one for the program");
    bench.run(&["man", "nowhere"]).fails(1, &["nowhere"]);
}

#[test]
fn a_table_has_the_sectors_of_its_device_or_those_that_were_asked_for() {
    let bench = Bench::new();
    let create = ["region", "create", "region.img", "--size", "32M", "--sector-size"];
    bench.run(&[&create[..], &["1024"]].concat()).fails(1, &["512", "4096"]);
    bench.run(&[&create[..], &["4096"]].concat()).succeeds();
    bench.run(&["format", "region.img#a", "--size", "4M", KEY[0], KEY[1]]).succeeds();
    bench.run(&["resize", "region.img#a", "--size", "6M", KEY[0], KEY[1]]).succeeds();
    let device = loop_device(&bench.path("region.img"), &["--sector-size", "4096"]);
    let Some(device) = device.as_deref() else { return };
    let sfdisk = |option: &str| Run::of(tool_command("sfdisk", &[option, device]));
    let done = [
        sfdisk("--json"),
        sfdisk("--verify"),
        bench.run(&["region", "create", device, "--force"]),
        bench.run(&["format", &format!("{device}#b"), "--size", "4M", KEY[0], KEY[1]]),
        sfdisk("--json"),
    ];
    let refused = bench.run(&["region", "create", device, "--force", "--sector-size", "512"]);
    tool("losetup", &["--detach", device]);
    let [of_file, verdict, _, _, of_device] = done.map(Run::succeeds);
    refused.fails(1, &["has sectors of 4096 bytes"]);
    assert!(verdict.stdout.contains("No errors detected"), "{}{}", verdict.stdout, verdict.stderr);
    for (table, name, sectors) in [(of_file, "a", 2048), (of_device, "b", 1536)] {
        let table: Value = serde_json::from_str(&table.stdout).unwrap();
        let partition = &table["partitiontable"]["partitions"][0];
        assert_eq!((&partition["name"], &partition["start"]), (&name.into(), &512.into()));
        assert_eq!(partition["size"], sectors);
    }
}

//! `daxcrypt serve`: namespaces over NBD.
//!
//! The command line or a configuration file becomes a [`Plan`]; the plan becomes exports, listeners and a server.
//! Guards: nobody is told that the server is ready before every export has been read from.

mod config;
mod exports;
mod listeners;
mod locking;
mod meter;
mod rekey;
mod reload;
mod sandbox;
mod steering;
mod tls;
mod volumes;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::Args;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use self::exports::Source;
use self::listeners::{Account, Address};
use self::reload::Reloader;
use self::sandbox::Opens;
use self::steering::Steering;
use self::tls::{TlsMode, TlsPlan};
use self::volumes::Volumes;
use super::credentials::KeyArgs;
use super::duration::Span;
use super::error::Error;
use super::export_limits::LimitArgs;
use super::export_options::ExportOptions;
use super::log;
use super::output::warning;
use super::size::ByteSize;
use crate::nbd_server::{self, Commands, Limits, Listener, Options, Server};
use crate::secret;

#[derive(Args, Clone, Debug)]
pub(crate) struct ServeArgs {
    /// Namespaces to serve; the first one is the default export
    #[arg(required_unless_present = "config", value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Take namespaces, limits and TLS from a TOML file, and its listeners besides those given here
    #[arg(long, value_name = "FILE", conflicts_with_all = ["paths", "KeyArgs", "read_only", "allow_discards", "tls",
        "tls_certificates", "tls_verify_client", "max_connections", "max_buffer", "LimitArgs"])]
    config: Option<PathBuf>,
    /// File that holds the header of the one namespace, when it is detached
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    header: Option<PathBuf>,
    /// With --header, take the data for that of the header although its tag is not there, or it never had one, and write the
    /// tag behind the data; what is in that page is lost
    #[arg(long, requires = "header", conflicts_with_all = ["read_only", "luks2"])]
    accept_data: bool,
    /// They are LUKS2 volumes (of cryptsetup) and not namespaces
    #[arg(long, conflicts_with_all = ["config", "allow_discards"])]
    luks2: bool,
    #[command(flatten)]
    key: KeyArgs,
    /// Listen on a Unix socket (may be given several times); sockets that systemd passes are listened on in any case
    #[arg(long = "socket", value_name = "SOCKET")]
    sockets: Vec<PathBuf>,
    /// Permissions of the sockets, such as 0660 [default: 0600]
    #[arg(long, value_name = "MODE", requires = "sockets")]
    socket_mode: Option<String>,
    /// User, by name or number, that the sockets belong to
    #[arg(long, value_name = "USER", requires = "sockets")]
    socket_owner: Option<Account>,
    /// Group, by name or number, that the sockets belong to
    #[arg(long, value_name = "GROUP", requires = "sockets")]
    socket_group: Option<Account>,
    /// Listen on a TCP address such as 127.0.0.1:10809, or for virtual machines on vsock:PORT, or vsock:PORT:CID,CID for
    /// those with these context numbers only (may be given several times); NBD without TLS is readable by everyone on the way
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Vec<Address>,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Let discards punch holes from now on; media then shows which units are unused, and there is no way back
    #[arg(long, conflicts_with = "read_only")]
    allow_discards: bool,
    /// Whether clients may or must use TLS [default: require with --tls-certificates, otherwise off]
    #[arg(long, value_enum)]
    tls: Option<TlsMode>,
    /// Folder with server-cert.pem, server-key.pem and, for --tls-verify-client, ca-cert.pem and perhaps ca-crl.pem (revoked
    /// certificates); SIGHUP reads it again
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
    /// Admit only clients with a certificate of the authority in ca-cert.pem
    #[arg(long, requires = "tls_certificates")]
    tls_verify_client: bool,
    /// Socket, made with mode 0600, on which `daxcrypt status` asks
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Answer Prometheus at http://ADDRESS:PORT/metrics
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<String>,
    /// Serve the other namespaces when one cannot be served
    #[arg(long)]
    keep_going: bool,
    /// Clients at a time [default: 4096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_connections: Option<u32>,
    /// Memory for the large requests and replies of all clients together, with the socket buffers that the kernel enlarges
    /// for them: all the plaintext that a server keeps, but for 40 KiB a client [default: 128M]
    #[arg(long, value_name = "SIZE", visible_alias = "resident-max")]
    max_buffer: Option<ByteSize>,
    #[command(flatten)]
    limits: LimitArgs,
    /// Microseconds to poll for the next request before sleeping; 0 turns polling off [default: 50]
    #[arg(long, value_name = "MICROSECONDS")]
    poll_us: Option<u64>,
    /// Bytes a second at most for a re-key that goes on while its namespace is served, such as 100M
    #[arg(long, value_name = "SIZE")]
    rekey_max_rate: Option<ByteSize>,
    /// Threads that share the work of requests of 256 KiB and more, for machines with CPUs to spare [default: 1, each
    /// client's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Lock an export that nobody has asked anything of for so long, such as 10m: its key and plaintext are wiped, and requests
    /// wait until `daxcrypt unlock`
    #[arg(long, value_name = "IDLE")]
    lock_after: Option<Span>,
    /// Folder whose namespaces `daxcrypt exports add` may add: the sandbox opens no others but those that are served from the
    /// start (may be given several times)
    #[arg(long = "export-folder", value_name = "DIR")]
    export_folders: Vec<PathBuf>,
    /// Keep every right of the process: without seccomp, Landlock and dropped capabilities
    #[arg(long)]
    no_sandbox: bool,
    /// When stopping, close connections instead of answering requests with an error, so that clients that connect again
    /// repeat them on the next server
    #[arg(long)]
    hang_up: bool,
    /// What to log on standard error: off, error, warn, info, debug or trace [default: $DAXCRYPT_LOG, or info]
    #[arg(long, value_name = "LEVEL")]
    log: Option<String>,
}

/// Everything that decides what a server does.
#[derive(Debug)]
struct Plan {
    namespaces: Vec<Source>,
    addresses: Vec<Address>,
    control: Option<PathBuf>,
    metrics: Option<String>,
    tls: TlsPlan,
    limits: Limits,
    poll: Option<Duration>,
    threads: Option<u16>,
    hang_up: bool,
    keep_going: bool,
    lock_after: Option<Duration>,
    export_folders: Vec<PathBuf>,
    sandbox: bool,
}

pub(crate) fn run(args: &ServeArgs) -> Result<(), Error> {
    log::start(args.log.as_deref())?;
    let reads_stdin = args.key.passphrase_file.as_deref() == Some(Path::new("-"));
    if reads_stdin && args.paths.len() > 1 {
        let what = "standard input can be read for one namespace only: give --passphrase-file FILE, or --config FILE";
        return Err(Error::Usage(what.into()));
    }
    if args.header.is_some() && args.paths.len() > 1 {
        return Err(Error::Usage("--header is for one namespace; --config FILE takes one for each".into()));
    }
    let plan = read_plan(args)?;
    let tls = tls::set_up(&plan.tls, &plan.namespaces)?;
    let volumes = Arc::new(Volumes::new(args.rekey_max_rate));
    let exports = exports::open_all(&plan.namespaces, plan.keep_going, &volumes)?;
    if secret::lock_refused() {
        warning!("key memory could not be locked in RAM (ulimit -l), so it may reach swap");
    }
    let names: Vec<_> = exports.iter().map(|served| (served.info.name.clone(), served.size_bytes())).collect();
    let reloader = Reloader::new(args, &volumes, tls.is_some());
    let mut options = Options { tls, ..Options::default() };
    options.poll = plan.poll.unwrap_or(options.poll);
    options.threads = plan.threads.map_or(options.threads, usize::from);
    options.hang_up = plan.hang_up;
    let server = Server::new(exports, fitting_limits(&plan.limits), options)?;
    // Until here a signal ends the process, whatever it waits for: a key derivation may take minutes. From here on there is
    // something that it could leave behind.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP])
        .map_err(|source| Error::Io { doing: "cannot catch SIGTERM, SIGINT and SIGHUP", source })?;
    volumes.mark_in_use()?;
    let steering = Arc::new(Steering { volumes: Arc::clone(&volumes), server: server.handle(), reloader });
    let served = listen(&plan, server, &names, &steering).and_then(|server| {
        if plan.sandbox {
            sandbox::enter(&Opens::of(&plan, args.config.as_deref(), &plan.export_folders));
        }
        // Threads have what their maker has: none is made before.
        volumes.start_rekeys();
        obey_signals(signals, steering);
        if let Some(idle) = plan.lock_after {
            locking::lock_when_idle(Arc::clone(&volumes), server.handle(), idle);
        }
        tell_systemd("READY=1");
        Ok(server.run()?)
    });
    // Nobody writes any more, and the server has flushed what it could.
    let closed = volumes.close();
    served.and(closed)
}

/// What the command line says, and the file if it names one.
fn read_plan(args: &ServeArgs) -> Result<Plan, Error> {
    match &args.config {
        None => plan(args),
        Some(path) => with_file(config::read(path)?, args),
    }
}

/// The limits, lowered to the open files that this process may have.
fn fitting_limits(wanted: &Limits) -> Limits {
    let limits = wanted.clone().fitted_to_descriptors();
    if limits.connections_max < wanted.connections_max {
        let (fitting, wanted) = (limits.connections_max, wanted.connections_max);
        warning!("{fitting} clients at a time instead of {wanted}: the limit on open files (ulimit -n) allows no more");
    }
    limits
}

/// The server with all its ways in. Nobody is answered yet.
///
/// Those of clients are opened last: whoever finds the server's socket finds all that it was asked for.
fn listen(plan: &Plan, server: Server, names: &[(String, u64)], steering: &Arc<Steering>) -> Result<Server, Error> {
    let told = Arc::clone(&steering.volumes);
    let mut server = server.rekeys(move || told.rekeys());
    for address in plan.metrics.iter().map(|text| listeners::resolve(text)).collect::<Result<Vec<_>, _>>()?.concat() {
        server = server.metrics(Listener::tcp(address)?);
    }
    if let Some(path) = &plan.control {
        let asked = Arc::clone(steering);
        let commands = Commands::new(move |received| asked.answer(received));
        server = server.control(Listener::unix(path)?).commands(commands);
    }
    for (address, listener) in listeners::open(&plan.addresses)? {
        listeners::announce(&address, &listener, names, plan.tls.mode)?;
        server = server.listen(listener);
    }
    Ok(server)
}

/// What the command line alone says.
fn plan(args: &ServeArgs) -> Result<Plan, Error> {
    let source = |path: &PathBuf| Source {
        path: path.clone(),
        header: args.header.clone(),
        accept_data: args.accept_data,
        key: args.key.clone(),
        options: ExportOptions {
            luks2: args.luks2,
            read_only: args.read_only,
            allow_discards: args.allow_discards,
            limits: args.limits,
            ..ExportOptions::default()
        },
    };
    let mut limits = Limits::default();
    if let Some(connections) = args.max_connections {
        limits.connections_max = connections as usize;
        limits.handshaking_max = limits.handshaking_max.min(limits.connections_max);
    }
    if let Some(ByteSize(bytes)) = args.max_buffer {
        limits.buffer_bytes_max = usize::try_from(bytes).unwrap_or(usize::MAX);
    }
    let offered = if args.tls_certificates.is_some() { TlsMode::Require } else { TlsMode::Off };
    let tls = TlsPlan {
        mode: args.tls.unwrap_or(offered),
        certificates: args.tls_certificates.clone(),
        verify_client: args.tls_verify_client,
    };
    let nothing = Plan {
        namespaces: args.paths.iter().map(source).collect(),
        addresses: Vec::new(),
        control: None,
        metrics: None,
        tls,
        limits,
        poll: None,
        threads: None,
        hang_up: false,
        keep_going: false,
        lock_after: None,
        export_folders: Vec::new(),
        sandbox: true,
    };
    with_file(nothing, args)
}

/// `plan` with the options that may stand beside a file.
fn with_file(mut plan: Plan, args: &ServeArgs) -> Result<Plan, Error> {
    let (owner, group) = (args.socket_owner.as_ref(), args.socket_group.as_ref());
    let rights = listeners::socket_rights(args.socket_mode.as_deref(), owner, group).map_err(Error::Usage)?;
    plan.addresses.extend(args.sockets.iter().map(|path| Address::Unix(path.clone(), rights)));
    plan.addresses.extend(args.listen.iter().cloned());
    plan.control = args.control.clone().or(plan.control);
    plan.metrics = args.metrics.clone().or(plan.metrics);
    plan.poll = args.poll_us.map(Duration::from_micros).or(plan.poll);
    plan.threads = args.threads.or(plan.threads);
    plan.hang_up |= args.hang_up;
    plan.keep_going |= args.keep_going;
    plan.export_folders.extend(args.export_folders.iter().cloned());
    plan.sandbox &= !args.no_sandbox;
    plan.lock_after = args.lock_after.map(|Span(idle)| idle).or(plan.lock_after);
    if plan.lock_after.is_some() && plan.control.is_none() {
        return Err(Error::Usage("lock_after needs a control socket (control = ...), to unlock what is locked".into()));
    }
    Ok(plan)
}

/// The first signal to end drains; the thread stays, so that a second one changes nothing.
fn obey_signals(mut signals: Signals, steering: Arc<Steering>) {
    thread::spawn(move || {
        for signal in signals.forever() {
            if signal == SIGHUP {
                let _ = steering.reloader.reload(&steering.server); // it has said what became of it
            } else {
                tell_systemd("STOPPING=1");
                steering.server.stop();
            }
        }
    });
}

/// A supervisor that cannot be told is no reason not to serve.
fn tell_systemd(state: &str) {
    if let Err(error) = nbd_server::notify(state) {
        tracing::warn!(%error, state, "systemd could not be told");
    }
}

/// `vault` for `/srv/vault.img`.
pub(crate) fn stem(path: &Path) -> String {
    path.file_stem().map_or_else(|| "namespace".into(), |stem| stem.to_string_lossy().into_owned())
}

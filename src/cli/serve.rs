//! `daxcrypt serve`: namespaces over NBD.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::credentials::KeyArgs;
use super::error::Error;
use super::open;
use super::size::ByteSize;
use crate::nbd_server::{ExportInfo, Exports, Handle, Limits, Listener, Options, Server};
use crate::pmem::Access;
use crate::secret;
use crate::volume::Volume;
use crate::xts::Backend;

#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    /// Namespaces to serve; the first one is the default export
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    #[command(flatten)]
    key: KeyArgs,
    /// Listen on a Unix socket, made with mode 0600 (may be given several times)
    #[arg(long = "socket", value_name = "SOCKET", required_unless_present = "listen")]
    sockets: Vec<PathBuf>,
    /// Listen on a TCP address such as 127.0.0.1:10809; NBD without TLS is readable by everyone on the way (may be given several times)
    #[arg(long = "listen", value_name = "ADDRESS:PORT", id = "listen")]
    listen: Vec<String>,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Microseconds to poll for the next request before sleeping; 0 turns polling off
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50)]
    poll_us: u64,
}

pub(crate) fn run(args: &ServeArgs) -> Result<(), Error> {
    // Signals are caught before anything is there that they could leave behind.
    let signals = Signals::new([SIGTERM, SIGINT])
        .map_err(|source| Error::Io { doing: "cannot catch SIGTERM and SIGINT", source })?;
    let exports = exports(args)?;
    if secret::lock_refused() {
        eprintln!("daxcrypt: warning: key memory could not be locked in RAM (ulimit -l), so it may reach swap");
    }
    let names: Vec<_> = exports.iter().map(|served| (served.info.name.clone(), served.size_bytes())).collect();
    let options = Options { poll: Duration::from_micros(args.poll_us), ..Options::default() };
    let mut server = Server::new(exports, Limits::default(), options)?;
    for listener in listeners(args)? {
        announce(&listener, &names);
        server = server.listen(listener);
    }
    stop_on_signal(signals, server.handle());
    Ok(server.run()?)
}

fn exports(args: &ServeArgs) -> Result<Exports, Error> {
    let backend = Backend::from_env()?;
    let access = if args.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let mut exports = Exports::new();
    for path in &args.paths {
        let namespace = open::namespace(path, access, &args.key)?;
        let label = namespace.header().label;
        let name = if label.is_empty() { stem(path) } else { label };
        let volume = Volume::new(namespace, backend);
        if volume.discards() {
            eprintln!(
                "daxcrypt: warning: {}: discards are allowed, so media shows which units are unused",
                path.display()
            );
        }
        let info = ExportInfo { name, read_only: args.read_only, ..ExportInfo::default() };
        exports.add(info, Arc::new(volume)).map_err(|source| Error::Export { path: path.clone(), source })?;
    }
    Ok(exports)
}

fn listeners(args: &ServeArgs) -> Result<Vec<Listener>, Error> {
    let mut listeners = Vec::new();
    for path in &args.sockets {
        listeners.push(Listener::unix(path)?);
    }
    for text in &args.listen {
        for address in resolve(text)? {
            listeners.push(Listener::tcp(address)?);
        }
    }
    Ok(listeners)
}

fn resolve(text: &str) -> Result<Vec<SocketAddr>, Error> {
    let addresses: Vec<_> = text
        .to_socket_addrs()
        .map_err(|error| {
            Error::Usage(format!("--listen {text}: {error} (an address and a port, such as 127.0.0.1:10809)"))
        })?
        .collect();
    Ok(addresses)
}

/// One line for each way in, so that it can be copied.
fn announce(listener: &Listener, names: &[(String, u64)]) {
    for (name, size) in names {
        let size = ByteSize(*size);
        if let Some(path) = listener.unix_path() {
            println!("serving {name} ({size}) at nbd+unix:///{name}?socket={}", path.display());
        } else if let Some(address) = listener.tcp_address() {
            println!("serving {name} ({size}) at nbd://{address}/{name}");
        }
    }
}

/// The first signal drains; the thread stays, so that a second one changes nothing.
fn stop_on_signal(mut signals: Signals, server: Handle) {
    thread::spawn(move || {
        for _ in signals.forever() {
            server.stop();
        }
    });
}

/// `vault` for `/srv/vault.img`.
pub(crate) fn stem(path: &Path) -> String {
    path.file_stem().map_or_else(|| "namespace".into(), |stem| stem.to_string_lossy().into_owned())
}

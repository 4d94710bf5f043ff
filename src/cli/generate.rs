//! `daxcrypt completions` and `daxcrypt man`: what is made from the command line's own definition.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::error::Error;
use super::output::out;

#[derive(Args, Debug)]
pub(crate) struct CompletionsArgs {
    /// Shell to complete in
    shell: Shell,
}

#[derive(Args, Debug)]
pub(crate) struct ManArgs {
    /// Folder for the pages, which must exist
    folder: PathBuf,
}

pub(crate) fn completions<C: CommandFactory>(args: &CompletionsArgs) -> Result<(), Error> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut C::command(), "daxcrypt", &mut script);
    out!("{}", String::from_utf8_lossy(&script))
}

/// One page for the program and one for each command.
pub(crate) fn man<C: CommandFactory>(args: &ManArgs) -> Result<(), Error> {
    let command = C::command().disable_help_subcommand(true);
    clap_mangen::generate_to(command, &args.folder).map_err(|source| Error::WriteFile {
        what: "manual pages in",
        path: args.folder.clone(),
        source,
    })
}

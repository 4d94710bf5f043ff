//! `daxcrypt completions` and `daxcrypt man`: what is made from the command line's own definition.

use std::path::{Path, PathBuf};
use std::{fs, io};

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

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
    let mut command = C::command().disable_help_subcommand(true);
    command.build();
    pages(&command, &args.folder).map_err(|source| Error::WriteFile {
        what: "manual pages in",
        path: args.folder.clone(),
        source,
    })
}

fn pages(command: &clap::Command, folder: &Path) -> io::Result<()> {
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        pages(below, folder)?;
    }
    let page = Man::new(command.clone());
    let mut text = Vec::new();
    page.render(&mut text)?;
    fs::write(folder.join(page.get_filename()), as_it_stands(&String::from_utf8_lossy(&text)))
}

/// The page with its last part, examples as a rule, as it stands: filled to the width of a page it could not be pasted.
fn as_it_stands(page: &str) -> String {
    let Some((before, rest)) = page.split_once(".SH EXTRA\n") else { return page.to_owned() };
    let end = rest.find("\n.SH ").unwrap_or(rest.len());
    let (last, after) = rest.split_at(end);
    let (title, last) = last.strip_prefix("Examples:\n").map_or(("NOTES", last), |examples| ("EXAMPLES", examples));
    format!("{before}.SH {title}\n.nf\n{}\n.fi{after}", last.trim_end())
}

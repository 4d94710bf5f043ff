//! Recovery phrases are shown once, so they are shown before they count: a slot whose phrase nobody has seen would look like a
//! way back in, and be none.

use super::error::Error;
use super::output;
use crate::namespace::{Credential, KdfCost, Namespace, UpdateError, recovery_phrase};

/// The name that the slot gets.
pub(super) const LABEL: &str = "recovery";

/// Prints a new phrase, and adds a slot that it opens when the phrase has been written out.
pub(super) fn add_slot(
    namespace: &mut Namespace,
    slot: Option<u32>,
    label: &str,
    failed: impl Fn(UpdateError) -> Error,
) -> Result<(), Error> {
    let credential = Credential::Passphrase(recovery_phrase()?);
    let label = if label.is_empty() { LABEL } else { label };
    let Credential::Passphrase(phrase) = &credential else { unreachable!("made above") };
    output::outln!("recovery phrase, which is not shown again and counts when its key slot is told below:")?;
    output::secret_to_keep(phrase).map_err(|source| Error::PhraseNotShown { source })?;
    let id = namespace.add_slot(slot, label, &credential, KdfCost::LEAST).map_err(failed)?;
    output::outln!("added key slot {id}, which opens with it")
}

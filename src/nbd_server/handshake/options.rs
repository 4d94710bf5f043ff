//! What each option does, and how it is refused.
//!
//! The first function decides by the TLS mode alone; after it every option may assume that it is allowed now.

use super::super::limits::{MINIMUM_BLOCK_BYTES, OPTION_PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MAX, PREFERRED_BLOCK_BYTES};
use super::super::negotiated::{ALLOCATION_CONTEXT_ID, Negotiated, ReplyStyle};
use super::super::wire::{
    EXPORT_NAME_PADDING_BYTES, NBD_INFO_BLOCK_SIZE, NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT, NBD_INFO_NAME,
    NBD_OPT_ABORT, NBD_OPT_EXPORT_NAME, NBD_OPT_EXTENDED_HEADERS, NBD_OPT_GO, NBD_OPT_INFO, NBD_OPT_LIST,
    NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT, NBD_OPT_STARTTLS, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK,
    NBD_REP_ERR_EXT_HEADER_REQD, NBD_REP_ERR_INVALID, NBD_REP_ERR_POLICY, NBD_REP_ERR_SHUTDOWN, NBD_REP_ERR_TLS_REQD,
    NBD_REP_ERR_TOO_BIG, NBD_REP_ERR_UNKNOWN, NBD_REP_ERR_UNSUP, NBD_REP_INFO, NBD_REP_META_CONTEXT, NBD_REP_SERVER,
    OptionHeader, encode_option_reply,
};
use super::payload::{InfoPayload, MetaContextPayload, export_name};
use super::{CloseReason, Handshake, Lookup, Outcome, SelectedContexts, Step, TlsMode, closed};

/// The one metadata context that exists.
const ALLOCATION: &str = "base:allocation";
/// The query that names all contexts of the `base` namespace.
const BASE_WILDCARD: &str = "base:";
/// Characters of an export name that an error text repeats.
const QUOTED_NAME_CHARS_MAX: usize = 64;

/// A refusal: the reply type and its text.
type Refusal = (u32, String);

impl Handshake {
    /// Runs one complete option.
    pub(super) fn run_option(&mut self, option: u32, payload: &[u8], output: &mut Vec<u8>) -> Step {
        if option == NBD_OPT_ABORT {
            encode_option_reply(output, option, NBD_REP_ACK, &[]);
            return closed(CloseReason::Aborted);
        }
        if option == NBD_OPT_EXPORT_NAME {
            return self.export_name(payload, output);
        }
        let result = self.gate(option).and_then(|()| match option {
            NBD_OPT_LIST => self.list(payload, output),
            NBD_OPT_STARTTLS => self.start_tls(payload),
            NBD_OPT_INFO | NBD_OPT_GO => self.info(option, payload, output),
            NBD_OPT_STRUCTURED_REPLY => self.structured_reply(payload),
            NBD_OPT_LIST_META_CONTEXT => self.list_meta_context(payload, output),
            NBD_OPT_SET_META_CONTEXT => self.set_meta_context(payload, output),
            NBD_OPT_EXTENDED_HEADERS => self.extended_headers(payload),
            unknown => Err((NBD_REP_ERR_UNSUP, format!("option {unknown} is not supported"))),
        });
        match result {
            Ok(step) => {
                encode_option_reply(output, option, NBD_REP_ACK, &[]);
                step
            }
            Err((reply, text)) => {
                encode_option_reply(output, option, reply, text.as_bytes());
                Step::Continue
            }
        }
    }

    /// Refuses an option whose payload is skipped instead of parsed.
    pub(super) fn refuse_too_big(&mut self, header: OptionHeader, output: &mut Vec<u8>) -> Step {
        let OptionHeader { option, payload_bytes } = header;
        match option {
            NBD_OPT_ABORT => return self.run_option(option, &[], output),
            NBD_OPT_EXPORT_NAME => return closed(CloseReason::ExportNameRefused),
            NBD_OPT_SET_META_CONTEXT => self.contexts = None,
            _ => {}
        }
        let too_big = format!("option payload of {payload_bytes} bytes exceeds {OPTION_PAYLOAD_BYTES_MAX}");
        let (reply, text) = match self.gate(option) {
            Err(refusal) => refusal,
            Ok(()) if !is_known(option) => (NBD_REP_ERR_UNSUP, format!("option {option} is not supported")),
            Ok(()) => (NBD_REP_ERR_TOO_BIG, too_big),
        };
        encode_option_reply(output, option, reply, text.as_bytes());
        Step::Continue
    }

    /// What stands above the single option: shutdown, then TLS.
    fn gate(&self, option: u32) -> Result<(), Refusal> {
        if self.stopping {
            return Err((NBD_REP_ERR_SHUTDOWN, "the server is shutting down".into()));
        }
        if self.tls_mode == TlsMode::Require && !self.tls_active && option != NBD_OPT_STARTTLS {
            return Err((NBD_REP_ERR_TLS_REQD, "this server requires TLS".into()));
        }
        Ok(())
    }

    fn export_name(&self, payload: &[u8], output: &mut Vec<u8>) -> Step {
        let refused = closed(CloseReason::ExportNameRefused);
        if self.gate(NBD_OPT_EXPORT_NAME).is_err() || self.replies == ReplyStyle::Extended {
            return refused;
        }
        let Ok(name) = export_name(payload) else { return refused };
        let Lookup::Found(served) = self.lookup(name) else { return refused };
        let negotiated = self.negotiated(served, name);
        output.extend_from_slice(&negotiated.size_bytes.to_be_bytes());
        output.extend_from_slice(&negotiated.transmission_flags().to_be_bytes());
        if !self.no_zeroes {
            output.extend_from_slice(&[0; EXPORT_NAME_PADDING_BYTES]);
        }
        Step::Done(Outcome::Transmission(negotiated))
    }

    fn list(&self, payload: &[u8], output: &mut Vec<u8>) -> Result<Step, Refusal> {
        require_empty(payload)?;
        for served in self.exports.iter().filter(|served| self.admits(served)) {
            let (name, description) = (served.info.name.as_bytes(), served.info.description.as_bytes());
            let mut entry = Vec::with_capacity(4 + name.len() + description.len());
            push_string(&mut entry, name);
            entry.extend_from_slice(description);
            encode_option_reply(output, NBD_OPT_LIST, NBD_REP_SERVER, &entry);
        }
        Ok(Step::Continue)
    }

    fn start_tls(&self, payload: &[u8]) -> Result<Step, Refusal> {
        if self.tls_mode == TlsMode::Off {
            return Err((NBD_REP_ERR_POLICY, "this server does not offer TLS".into()));
        }
        if self.tls_active {
            return Err((NBD_REP_ERR_INVALID, "TLS is already active".into()));
        }
        require_empty(payload)?;
        Ok(Step::Done(Outcome::StartTls))
    }

    fn info(&self, option: u32, payload: &[u8], output: &mut Vec<u8>) -> Result<Step, Refusal> {
        let request = InfoPayload::parse(payload).map_err(invalid)?;
        let served = match self.lookup(request.name) {
            Lookup::Found(served) => served,
            Lookup::Unknown => return Err(unknown_export(request.name)),
            Lookup::NeedsTls => return Err((NBD_REP_ERR_TLS_REQD, "this export requires TLS".into())),
        };
        let negotiated = self.negotiated(served, request.name);
        push_infos(option, &negotiated, &request, output);
        let chosen = option == NBD_OPT_GO;
        Ok(if chosen { Step::Done(Outcome::Transmission(negotiated)) } else { Step::Continue })
    }

    fn structured_reply(&mut self, payload: &[u8]) -> Result<Step, Refusal> {
        require_empty(payload)?;
        if self.replies == ReplyStyle::Extended {
            return Err((NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are already negotiated".into()));
        }
        self.replies = ReplyStyle::Structured;
        Ok(Step::Continue)
    }

    fn extended_headers(&mut self, payload: &[u8]) -> Result<Step, Refusal> {
        require_empty(payload)?;
        if self.replies == ReplyStyle::Extended {
            return Err((NBD_REP_ERR_INVALID, "extended headers are already negotiated".into()));
        }
        self.replies = ReplyStyle::Extended;
        Ok(Step::Continue)
    }

    fn list_meta_context(&self, payload: &[u8], output: &mut Vec<u8>) -> Result<Step, Refusal> {
        let request = self.meta_context_request(payload)?;
        let asked = request.query_count == 0 || request.asks_for(BASE_WILDCARD) || request.asks_for(ALLOCATION);
        if asked {
            push_context(NBD_OPT_LIST_META_CONTEXT, 0, output);
        }
        Ok(Step::Continue)
    }

    fn set_meta_context(&mut self, payload: &[u8], output: &mut Vec<u8>) -> Result<Step, Refusal> {
        // An earlier selection ends here even if this one fails.
        self.contexts = None;
        let request = self.meta_context_request(payload)?;
        let allocation = request.asks_for(ALLOCATION);
        if allocation {
            push_context(NBD_OPT_SET_META_CONTEXT, ALLOCATION_CONTEXT_ID, output);
        }
        self.contexts = Some(SelectedContexts { export_name: request.name.to_owned(), allocation });
        Ok(Step::Continue)
    }

    fn meta_context_request<'a>(&self, payload: &'a [u8]) -> Result<MetaContextPayload<'a>, Refusal> {
        if self.replies == ReplyStyle::Simple {
            return Err((NBD_REP_ERR_INVALID, "negotiate structured replies or extended headers first".into()));
        }
        let request = MetaContextPayload::parse(payload).map_err(invalid)?;
        match self.lookup(request.name) {
            Lookup::Found(_) => Ok(request),
            Lookup::Unknown | Lookup::NeedsTls => Err(unknown_export(request.name)),
        }
    }
}

fn is_known(option: u32) -> bool {
    (NBD_OPT_EXPORT_NAME..=NBD_OPT_LIST).contains(&option)
        || (NBD_OPT_STARTTLS..=NBD_OPT_EXTENDED_HEADERS).contains(&option)
}

fn require_empty(payload: &[u8]) -> Result<(), Refusal> {
    if payload.is_empty() {
        return Ok(());
    }
    Err((NBD_REP_ERR_INVALID, format!("this option takes no payload, {} bytes came", payload.len())))
}

fn invalid(error: impl std::fmt::Display) -> Refusal {
    (NBD_REP_ERR_INVALID, error.to_string())
}

/// The name is the client's: it is shortened and made printable before it goes into a text.
fn unknown_export(name: &str) -> Refusal {
    let mut quoted: String = name.chars().take(QUOTED_NAME_CHARS_MAX).flat_map(char::escape_default).collect();
    if name.chars().nth(QUOTED_NAME_CHARS_MAX).is_some() {
        quoted.push_str("...");
    }
    (NBD_REP_ERR_UNKNOWN, format!("no export \"{quoted}\" for this client"))
}

fn push_string(output: &mut Vec<u8>, text: &[u8]) {
    let len_bytes = u32::try_from(text.len()).expect("registered strings have at most 4096 bytes");
    output.extend_from_slice(&len_bytes.to_be_bytes());
    output.extend_from_slice(text);
}

fn push_context(option: u32, id: u32, output: &mut Vec<u8>) {
    let mut payload = id.to_be_bytes().to_vec();
    payload.extend_from_slice(ALLOCATION.as_bytes());
    encode_option_reply(output, option, NBD_REP_META_CONTEXT, &payload);
}

fn push_infos(option: u32, negotiated: &Negotiated, request: &InfoPayload<'_>, output: &mut Vec<u8>) {
    let mut push = |info: u16, fields: &[&[u8]]| {
        let mut payload = info.to_be_bytes().to_vec();
        fields.iter().for_each(|field| payload.extend_from_slice(field));
        encode_option_reply(output, option, NBD_REP_INFO, &payload);
    };
    let (served, flags) = (&negotiated.served, negotiated.transmission_flags());
    push(NBD_INFO_EXPORT, &[&negotiated.size_bytes.to_be_bytes(), &flags.to_be_bytes()]);
    if request.asks_for(NBD_INFO_NAME) {
        push(NBD_INFO_NAME, &[served.info.name.as_bytes()]);
    }
    if request.asks_for(NBD_INFO_DESCRIPTION) && !served.info.description.is_empty() {
        push(NBD_INFO_DESCRIPTION, &[served.info.description.as_bytes()]);
    }
    if request.asks_for(NBD_INFO_BLOCK_SIZE) {
        let sizes = [MINIMUM_BLOCK_BYTES, PREFERRED_BLOCK_BYTES, PAYLOAD_BYTES_MAX].map(u32::to_be_bytes);
        push(NBD_INFO_BLOCK_SIZE, &[&sizes[0], &sizes[1], &sizes[2]]);
    }
}

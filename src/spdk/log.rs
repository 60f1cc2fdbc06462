//! SPDK's log goes to `tracing` in lloop_tgt; in SPDK's own programs what lloop has to say goes to SPDK's log.

use spdk_sys as sys;
use spdk_sys::compat::{self, VaList};
use spdk_sys::spdk_log_level as level;
use std::ffi::{CStr, CString, c_char, c_int};
use std::io::{self, Write};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// The log callback for `spdk_app_opts`.
///
/// # Safety
/// SPDK calls it with C strings, or null, and the format's arguments.
pub(super) unsafe extern "C" fn callback(
    severity: c_int,
    file: *const c_char,
    line: c_int,
    function: *const c_char,
    format: *const c_char,
    args: VaList,
) {
    // SPDK leaves the threshold to the callback.
    // SAFETY: reads a global.
    if severity > unsafe { sys::spdk_log_get_print_level() } || format.is_null() {
        return;
    }
    let mut buffer = [0u8; 1024];
    // SAFETY: format and arguments belong together, as SPDK passes them on.
    let wanted = unsafe { compat::format_log(&mut buffer, format, args) };
    let len = usize::try_from(wanted).unwrap_or(0).min(buffer.len() - 1);
    let text = String::from_utf8_lossy(&buffer[..len]);
    let text = text.trim_end();
    let string = |s: *const c_char| match s.is_null() {
        true => "".into(),
        // SAFETY: a C string that lives during the call.
        false => unsafe { CStr::from_ptr(s) }.to_string_lossy(),
    };
    let (file, function) = (string(file), string(function));
    let place = format_args!("{file}:{line}");
    match severity {
        level::SPDK_LOG_ERROR => tracing::error!(target: "spdk", %place, %function, "{text}"),
        level::SPDK_LOG_WARN => tracing::warn!(target: "spdk", %place, "{text}"),
        level::SPDK_LOG_NOTICE | level::SPDK_LOG_INFO => tracing::info!(target: "spdk", "{text}"),
        _ => tracing::debug!(target: "spdk", %place, %function, "{text}"),
    }
}

/// How much SPDK says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Level {
    /// Nothing.
    Disabled,
    /// Errors.
    Error,
    /// And warnings.
    Warn,
    /// And what is normal, but worth a line.
    Notice,
    /// And more.
    Info,
    /// And what a developer wants.
    Debug,
}

impl Level {
    pub(super) fn raw(self) -> sys::spdk_log_level::Type {
        match self {
            Level::Disabled => level::SPDK_LOG_DISABLED,
            Level::Error => level::SPDK_LOG_ERROR,
            Level::Warn => level::SPDK_LOG_WARN,
            Level::Notice => level::SPDK_LOG_NOTICE,
            Level::Info => level::SPDK_LOG_INFO,
            Level::Debug => level::SPDK_LOG_DEBUG,
        }
    }
}

/// Hands what is told to `tracing` to SPDK's log, unless somebody listens to it already. (A program of SPDK's own, with lloop
/// linked or preloaded, has no listener, and a warning that nobody hears is none.)
pub fn forward_to_spdk() {
    let filter = EnvFilter::try_from_env("LLOOP_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt().with_writer(SpdkLog).with_env_filter(filter);
    // An error says that there is a listener.
    let _ = subscriber.without_time().with_target(false).with_ansi(false).try_init();
}

/// Makes a [`Line`] for an event.
struct SpdkLog;

/// Where an event's text is written to, all of it in one call.
struct Line(sys::spdk_log_level::Type);

impl<'a> MakeWriter<'a> for SpdkLog {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(level::SPDK_LOG_NOTICE)
    }

    fn make_writer_for(&'a self, event: &tracing::Metadata<'_>) -> Line {
        Line(match *event.level() {
            tracing::Level::ERROR => level::SPDK_LOG_ERROR,
            tracing::Level::WARN => level::SPDK_LOG_WARN,
            tracing::Level::INFO => level::SPDK_LOG_NOTICE,
            tracing::Level::DEBUG | tracing::Level::TRACE => level::SPDK_LOG_DEBUG,
        })
    }
}

impl Write for Line {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let line = CString::new(text)?;
        // SAFETY: the format takes one C string, which is given; SPDK takes null for "no place in the source".
        unsafe {
            sys::spdk_log(self.0, std::ptr::null(), -1, std::ptr::null(), c"lloop: %s".as_ptr(), line.as_ptr());
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

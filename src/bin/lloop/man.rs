//! The manual page: one for all commands.

use crate::args::Args;
use crate::error::{Error, Result};
use clap::CommandFactory;
use clap_mangen::Man;
use std::io::{self, Write};

/// What is behind the commands.
const END: &str = r#".SH FILES
.TP
/var/tmp/spdk.sock
Where lloop_tgt listens unless told otherwise.
.TP
/etc/lloop/config.json
What \fBlloop save\fR writes, and lloop.service starts with.
.SH ENVIRONMENT
.TP
LLOOP_SOCKET
Where the target listens; \fB\-\-socket\fR goes before it.
.SH "EXIT STATUS"
0, 1 for what was refused or has failed, 2 for usage errors.
.SH "SEE ALSO"
.BR lloop_tgt (8)
"#;

/// Renders it.
///
/// # Errors
/// [`Error::Output`]
pub fn page() -> Result<Vec<u8>> {
    render().map_err(Error::Output)
}

fn render() -> io::Result<Vec<u8>> {
    // (Not built: commands would have the options of all in them, too.)
    let command = Args::command();
    let mut page = Vec::new();
    let man = Man::new(command.clone()).section("1").manual("lloop");
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    for (names, command) in commands(&command, "") {
        writeln!(page, ".SH \"{}\"", names.to_uppercase())?;
        let man = Man::new(command.clone().bin_name(format!("lloop {names}")).disable_help_flag(true));
        let mut section = Vec::new();
        man.render_synopsis_section(&mut section)?;
        man.render_description_section(&mut section)?;
        man.render_options_section(&mut section)?;
        // Sections of its own become parts of one.
        page.extend(String::from_utf8_lossy(&section).replace("\n.SH ", "\n.SS ").replacen(".SH ", ".SS ", 1).bytes());
    }
    page.write_all(END.as_bytes())?;
    Ok(page)
}

/// The commands that do something, those in groups with the names of their group before them.
fn commands<'a>(of: &'a clap::Command, group: &str) -> Vec<(String, &'a clap::Command)> {
    let shown = of.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help");
    shown
        .flat_map(|command| {
            let name = format!("{group}{}", command.get_name());
            match command.has_subcommands() {
                true => commands(command, &format!("{name} ")),
                false => vec![(name, command)],
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_in_it() {
        let page = String::from_utf8(page().unwrap()).unwrap();
        for word in [
            ".TH lloop 1",
            ".SH \"ATTACH\"",
            ".SH \"EXPORT NVMF\"",
            ".SH \"SAVE\"",
            "allow\\-any\\-fs",
            ".SH \"EXIT STATUS\"",
        ] {
            assert!(page.contains(word), "{word} in\n{page}");
        }
        assert!(page.matches("\\-\\-timeout").count() < 4, "options of all are there once");
        assert!(!page.contains(".SH \"MAN\"") && page.matches(".SH NAME").count() == 1);
    }
}

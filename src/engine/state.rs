//! The state of a volume, and what changes it. One table; the scheduler asks it, and users see what follows from it.

/// Where a volume is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum VolumeState {
    /// Requests are executed.
    Open,
    /// Nothing new is started, for a short while: discards are done.
    Held,
    /// A lock or the descriptor was lost and is being taken again. Nothing new is started.
    Recovering,
    /// A lock was lost, and somebody else may have been in: every request fails until an operator resumes the volume.
    Fenced,
    /// It is being detached by force: every request fails, for good.
    Ending,
}

/// What can happen to a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A job needs the volume for itself.
    Hold,
    /// A call has said that a lock or the descriptor is lost.
    Lost,
    /// The job that held it is done. What was lost meanwhile still has to be mended.
    GoOn,
    /// What was lost is there again, and nobody else was in.
    Recovered,
    /// The locks could not be had again without a gap.
    Fence,
    /// An operator has decided that the volume may go on.
    Resume,
    /// It is detached by force.
    End,
}

impl VolumeState {
    /// The state after `event`.
    ///
    /// A fence never opens by itself: only an operator's `Resume` leads out of `Fenced`. Nothing leads out of `Ending`.
    #[must_use]
    pub fn after(self, event: Event) -> VolumeState {
        use VolumeState::*;
        match (self, event) {
            (Ending, _) | (_, Event::End) => Ending,
            (_, Event::Resume) => Open,
            (Fenced, _) | (_, Event::Fence) => Fenced,
            (_, Event::Lost) => Recovering,
            (Recovering, Event::Hold | Event::GoOn) => Recovering,
            (_, Event::Hold) => Held,
            (_, Event::GoOn | Event::Recovered) => Open,
        }
    }

    /// Whether requests are started.
    pub fn starts(self) -> bool {
        self == VolumeState::Open
    }

    /// What requests are answered with instead of being executed.
    pub fn refuses(self) -> Option<i32> {
        match self {
            VolumeState::Fenced => Some(libc::ENOLCK),
            VolumeState::Ending => Some(libc::ENODEV),
            _ => None,
        }
    }

    /// From its number.
    pub(super) fn from_u8(number: u8) -> VolumeState {
        use VolumeState::*;
        *[Open, Held, Recovering, Fenced, Ending].get(number as usize).unwrap_or(&Ending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_table() {
        use VolumeState::*;
        let events = [Event::Hold, Event::Lost, Event::GoOn, Event::Recovered, Event::Fence, Event::Resume, Event::End];
        let table = [
            (Open, [Held, Recovering, Open, Open, Fenced, Open, Ending]),
            (Held, [Held, Recovering, Open, Open, Fenced, Open, Ending]),
            (Recovering, [Recovering, Recovering, Recovering, Open, Fenced, Open, Ending]),
            (Fenced, [Fenced, Fenced, Fenced, Fenced, Fenced, Open, Ending]),
            (Ending, [Ending; 7]),
        ];
        for (from, to) in table {
            for (event, expected) in events.into_iter().zip(to) {
                assert_eq!(from.after(event), expected, "{from:?} after {event:?}");
            }
            assert_eq!(VolumeState::from_u8(from as u8), from);
            assert_eq!(from.starts(), from == Open);
            assert_eq!(from.refuses().is_some(), matches!(from, Fenced | Ending));
        }
    }
}

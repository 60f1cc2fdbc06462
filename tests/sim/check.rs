//! What has to be true, whatever happens. The numbers are those of the rules in issue 11.
//!
//! Every request has a number; of two writes the one with the lower number was submitted first. A sector holds the number of the
//! write that has changed it last, 0 at the start.

use lloop::engine::Op;

pub type Id = u32;
pub type Sector = usize;

/// A request, as its host and the checker know it.
pub struct Record {
    pub op: Op,
    pub first: Sector,
    pub count: usize,
    pub fua: bool,
    pub submitted: u64,
    /// Time in which nobody can be asked to answer, up to its submission: servers hang, or the volume is not open.
    pub excused: u64,
    pub answered: bool,
    /// What a read has found.
    pub found: Vec<Id>,
    /// What reads and flushes have to respect: `Checker::floor` when it was submitted.
    pub floor: Vec<Id>,
    pub node: usize,
    /// The volume was fenced when it was submitted, for the how manieth time.
    pub fence: Option<u64>,
}

/// A moment, as an answer finds it.
pub struct Moment<'a> {
    pub now: u64,
    pub excused: u64,
    /// The volume is fenced, for the how manieth time.
    pub fence: Option<u64>,
    /// What is in the file.
    pub contents: &'a [Id],
}

pub struct Checker {
    pub records: Vec<Record>,
    /// The newest write of each sector that was answered with success.
    pub floor: Vec<Id>,
    /// The newest write of each sector that has to survive a power cut.
    pub durable: Vec<Id>,
    /// Writes up to here were lost by a failed fdatasync, and somebody was told.
    waived: Vec<Id>,
    /// The first rule that was seen broken.
    pub failure: Option<String>,
    pub flush_bound: u64,
    /// Writes that are tried again.
    retried: Vec<Id>,
}

impl Checker {
    pub fn new(sectors: usize, flush_bound: u64) -> Self {
        let nobody = Record {
            op: Op::Write,
            first: 0,
            count: sectors,
            fua: false,
            submitted: 0,
            excused: 0,
            answered: true,
            found: Vec::new(),
            floor: Vec::new(),
            node: 0,
            fence: None,
        };
        Checker {
            records: vec![nobody],
            floor: vec![0; sectors],
            durable: vec![0; sectors],
            waived: vec![0; sectors],
            failure: None,
            flush_bound,
            retried: Vec::new(),
        }
    }

    pub fn fail(&mut self, what: String) {
        self.failure.get_or_insert(what);
    }

    pub fn submit(&mut self, mut record: Record) -> Id {
        record.floor = match record.op {
            Op::Read => self.floor[record.first..record.first + record.count].to_vec(),
            Op::Flush => self.floor.clone(),
            _ => Vec::new(),
        };
        self.records.push(record);
        self.records.len() as Id - 1
    }

    /// A call changes a sector from `old` to what `id` wrote.
    pub fn takes_effect(&mut self, sector: Sector, old: Id, id: Id) {
        if old == id {
            return;
        }
        if self.floor[sector] > id {
            let newer = self.floor[sector];
            self.fail(format!(
                "rule 1, a ghost: sector {sector}: write {id} takes effect after the newer {newer} was answered"
            ));
        } else if self.records[id as usize].answered {
            self.fail(format!("rule 1: sector {sector}: write {id} takes effect after it was answered"));
        }
    }

    /// A host gets an answer. `moment` is what is the case now.
    pub fn answered(&mut self, id: Id, result: Result<(), i32>, moment: Moment<'_>) {
        let Moment { now, excused, fence, contents } = moment;
        let record = &mut self.records[id as usize];
        if std::mem::replace(&mut record.answered, true) {
            return self.fail(format!("request {id} is answered twice"));
        }
        let record = &self.records[id as usize];
        let range = record.first..record.first + record.count;
        let waited = (now - record.submitted).saturating_sub(excused - record.excused);
        if record.op == Op::Flush && waited > self.flush_bound {
            return self.fail(format!("rule 4: flush {id} took {} ms", waited / 1_000_000));
        }
        if result.is_err() {
            return;
        }
        if record.fence.is_some() && record.fence == fence && !matches!(record.op, Op::Abort | Op::Reset) {
            return self.fail(format!("request {id} succeeds although the volume is fenced"));
        }
        match record.op {
            Op::Read => {
                let stale = range.zip(&record.found).zip(&record.floor).find(|((_, found), floor)| found < floor);
                if record.found.len() != record.count {
                    self.fail(format!("read {id} is answered without data"));
                } else if let Some(((sector, found), floor)) = stale {
                    let what = format!("read {id}: sector {sector} has {found}, although {floor} was answered before");
                    self.fail(what);
                }
            }
            Op::Write | Op::Unmap | Op::WriteZeroes => {
                if let Some(sector) = range.clone().find(|&sector| contents[sector] < id) {
                    return self
                        .fail(format!("rule 1: write {id} is answered, but sector {sector} has {}", contents[sector]));
                }
                let durable = record.fua;
                for sector in range {
                    self.floor[sector] = self.floor[sector].max(id);
                    if durable {
                        self.durable[sector] = self.durable[sector].max(id);
                    }
                }
            }
            Op::Flush => {
                let floor = std::mem::take(&mut self.records[id as usize].floor);
                for (sector, id) in floor.into_iter().enumerate() {
                    if id > self.waived[sector] {
                        self.durable[sector] = self.durable[sector].max(id);
                    }
                }
            }
            Op::Abort | Op::Reset => {}
        }
    }

    /// A call for it has failed; the scheduler has it again.
    pub fn is_tried_again(&mut self, id: Id) {
        if self.records[id as usize].op.changes_data() {
            self.retried.push(id);
        }
    }

    /// It is on its way to its host.
    pub fn is_done(&mut self, id: Id) {
        self.retried.retain(|&other| other != id);
    }

    /// A flush begins: no older write of its volume may wait to be tried again.
    pub fn flush_begins(&mut self, flush: Id) {
        let Record { submitted, node, .. } = self.records[flush as usize];
        let records = &self.records;
        let is_older = |id: &Id| records[*id as usize].submitted < submitted && records[*id as usize].node == node;
        let overtaken = self.retried.iter().copied().find(is_older);
        if let Some(write) = overtaken {
            self.fail(format!("rule 4: flush {flush} overtakes write {write}, which is being tried again"));
        }
    }

    /// An fdatasync has failed, for these flushes, and what it lost is gone. `results` is what they are answered with.
    pub fn sync_failed(&mut self, told: bool, contents: &[Id]) {
        if !told {
            return self.fail("rule 4: an fdatasync has failed, and no flush is told".into());
        }
        for (sector, &id) in contents.iter().enumerate() {
            self.waived[sector] = self.waived[sector].max(id);
        }
    }

    /// After a power cut the file is this. Nobody gets an answer to what was under way.
    pub fn power_cut(&mut self, contents: &[Id]) {
        for (sector, &id) in contents.iter().enumerate() {
            if id < self.durable[sector] {
                let lost = self.durable[sector];
                self.fail(format!(
                    "lost: sector {sector} has {id} after a power cut, although {lost} was flushed or FUA"
                ));
            }
            (self.floor[sector], self.durable[sector]) = (id, id);
        }
        self.records.iter_mut().for_each(|record| record.answered = true);
        self.retried.clear();
    }
}

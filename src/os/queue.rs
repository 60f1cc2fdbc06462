//! Intrusive queues: how requests travel between a reactor and the workers without a lock or an allocation.
//!
//! A request lives in memory that somebody else provides (SPDK's bdev_io carries it as driver context). A [`Placed`] is the
//! one owner of such a request; it moves like a `Box` and frees nothing. The link that chains requests lies beside the value
//! in its [`Node`], out of reach of safe code, so a value is in one place at a time by construction.
//!
//! [`Inbox`] is a multi-producer queue emptied all at once: producers push a whole [`Batch`] with one compare-exchange, the
//! consumer takes everything with one swap. There is no ABA problem, because no producer looks behind the head it replaces
//! and the consumer leaves nothing behind. It has no capacity either: what bounds it is the number of requests in being.

use super::sync::{AtomicPtr, Ordering};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

/// Where a value and its link lie: reserve this much for a [`Placed`].
#[repr(C)]
pub struct Node<T> {
    next: *mut Node<T>,
    value: T,
}

/// The only owner of a `T` that lives in borrowed memory.
///
/// # Invariants
/// The pointer is to an initialised `Node<T>`, and nothing else reads or writes that node while this value exists.
#[must_use = "a request that is dropped is never answered"]
pub struct Placed<T>(NonNull<Node<T>>);

// SAFETY: a `Placed<T>` is the unique owner of its `T`, so sending it is sending the `T`; `next` is null or owned alike.
unsafe impl<T: Send> Send for Placed<T> {}

impl<T> Placed<T> {
    /// Moves `value` into `memory`.
    ///
    /// # Safety
    /// `memory` is valid for reads and writes and aligned for `Node<T>`, and stays so, used by nobody else, until the value
    /// is taken out with [`Placed::take`].
    pub unsafe fn new(memory: NonNull<MaybeUninit<Node<T>>>, value: T) -> Self {
        let node = memory.cast::<Node<T>>();
        // SAFETY: the caller says that the memory is writable and aligned.
        unsafe { node.write(Node { next: ptr::null_mut(), value }) };
        Placed(node)
    }

    /// Places `value` on the heap, for callers that have no memory of their own (tests, the control plane).
    pub fn on_heap(value: T) -> Self {
        let node = Box::leak(Box::new(MaybeUninit::<Node<T>>::uninit()));
        // SAFETY: freshly allocated for this type and leaked: nobody else has it. (`take` gives the value back; the node's few
        // bytes stay with the process.)
        unsafe { Placed::new(NonNull::from(node), value) }
    }

    /// Takes the value out; the memory is its provider's again.
    pub fn take(self) -> T {
        let node = self.into_raw();
        // SAFETY: by the invariant initialised and ours; `self` is gone, so it is read once.
        unsafe { ptr::read(&raw const (*node.as_ptr()).value) }
    }

    fn into_raw(self) -> NonNull<Node<T>> {
        let node = self.0;
        std::mem::forget(self);
        node
    }
}

impl<T> Deref for Placed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: by the invariant, initialised and not written by anybody else while `self` is borrowed.
        unsafe { &self.0.as_ref().value }
    }
}

impl<T> DerefMut for Placed<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: by the invariant, initialised and nobody else's; `self` is borrowed exclusively.
        unsafe { &mut self.0.as_mut().value }
    }
}

impl<T> Drop for Placed<T> {
    fn drop(&mut self) {
        // Leaking keeps memory sound; the request would hang, which is a bug to catch where it is made.
        debug_assert!(std::thread::panicking(), "a request was dropped without an answer");
    }
}

/// Memory for values that come and go by the million, in tests: what [`Places::take`] has emptied is used again.
///
/// # Invariants
/// Nobody uses what is in `free`. Each address in `used` is of memory that was leaked by [`Places::place`] and is not in `free`.
#[doc(hidden)]
pub struct Places<T> {
    free: Vec<NonNull<MaybeUninit<Node<T>>>>,
    used: std::collections::HashSet<usize>,
}

impl<T> Default for Places<T> {
    fn default() -> Self {
        Places { free: Vec::new(), used: std::collections::HashSet::new() }
    }
}

impl<T> Places<T> {
    /// Places `value`.
    pub fn place(&mut self, value: T) -> Placed<T> {
        let memory = self.free.pop().unwrap_or_else(|| NonNull::from(Box::leak(Box::new(MaybeUninit::uninit()))));
        self.used.insert(memory.as_ptr() as usize);
        // SAFETY: allocated for this type and never freed; not in `free` any more, so nobody else uses it until the value is taken out.
        unsafe { Placed::new(memory, value) }
    }

    /// Takes a value out that was placed here.
    pub fn take(&mut self, value: Placed<T>) -> T {
        let memory = value.0.cast();
        assert!(self.used.remove(&(value.0.as_ptr() as usize)), "it was placed elsewhere");
        let value = value.take();
        self.free.push(memory);
        value
    }
}

/// A first-in-first-out list of placed values.
///
/// # Invariants
/// `head` leads through `next` to `tail` over `len` nodes, each owned by this list; `tail.next` is null.
pub struct List<T> {
    head: *mut Node<T>,
    tail: *mut Node<T>,
    len: usize,
    owns: PhantomData<Placed<T>>,
}

// SAFETY: owns its nodes as `Placed` does.
unsafe impl<T: Send> Send for List<T> {}

impl<T> Default for List<T> {
    fn default() -> Self {
        List { head: ptr::null_mut(), tail: ptr::null_mut(), len: 0, owns: PhantomData }
    }
}

impl<T> List<T> {
    /// How many values it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.head.is_null()
    }

    /// The oldest value.
    pub fn front(&self) -> Option<&T> {
        // SAFETY: the list owns its nodes and is borrowed; null means empty.
        unsafe { self.head.as_ref().map(|node| &node.value) }
    }

    /// Adds a value as the newest.
    pub fn push_back(&mut self, value: Placed<T>) {
        let node = value.into_raw().as_ptr();
        // SAFETY: `node` was owned by `value` and is the list's now; `tail`, if any, is the list's.
        unsafe {
            (*node).next = ptr::null_mut();
            match self.tail.as_mut() {
                Some(tail) => tail.next = node,
                None => self.head = node,
            }
        }
        self.tail = node;
        self.len += 1;
    }

    /// Adds a value as the oldest.
    pub fn push_front(&mut self, value: Placed<T>) {
        let mut rest = std::mem::take(self);
        self.push_back(value);
        self.append(&mut rest);
    }

    /// Removes the oldest value.
    pub fn pop_front(&mut self) -> Option<Placed<T>> {
        let node = NonNull::new(self.head)?;
        // SAFETY: the head is owned by the list and leaves it here.
        self.head = unsafe { node.as_ref().next };
        if self.head.is_null() {
            self.tail = ptr::null_mut();
        }
        self.len -= 1;
        Some(Placed(node))
    }

    /// Moves everything of `other` behind what is here.
    pub fn append(&mut self, other: &mut List<T>) {
        let other = std::mem::take(other);
        if other.is_empty() {
            return;
        }
        // SAFETY: the nodes of both lists are ours now; `tail` is null only when this list is empty.
        unsafe {
            match self.tail.as_mut() {
                Some(tail) => tail.next = other.head,
                None => self.head = other.head,
            }
        }
        self.tail = other.tail;
        self.len += other.len;
        std::mem::forget(other);
    }

    /// Takes out the values that are `wanted`, in their order.
    pub fn extract(&mut self, mut wanted: impl FnMut(&Placed<T>) -> bool) -> List<T> {
        let (mut all, mut out) = (std::mem::take(self), List::default());
        while let Some(value) = all.pop_front() {
            if wanted(&value) { out.push_back(value) } else { self.push_back(value) }
        }
        out
    }

    /// Its values, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let mut node = self.head;
        std::iter::from_fn(move || {
            // SAFETY: the list owns its nodes and is borrowed for as long as the iterator is used.
            let current = unsafe { node.as_ref()? };
            node = current.next;
            Some(&current.value)
        })
    }

    /// Its values, oldest first, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        let mut node = self.head;
        std::iter::from_fn(move || {
            // SAFETY: as for `iter`, borrowed exclusively; each node is handed out once.
            let current = unsafe { node.as_mut()? };
            node = current.next;
            Some(&mut current.value)
        })
    }
}

impl<T> Drop for List<T> {
    fn drop(&mut self) {
        debug_assert!(self.is_empty() || std::thread::panicking(), "{} requests were dropped unanswered", self.len);
    }
}

/// What a producer has gathered for one push, newest at the head.
///
/// # Invariants
/// As for [`List`], with the order turned round: `head` is the newest, `tail` the oldest.
pub struct Batch<T> {
    head: *mut Node<T>,
    tail: *mut Node<T>,
    owns: PhantomData<Placed<T>>,
}

// SAFETY: owns its nodes as `Placed` does.
unsafe impl<T: Send> Send for Batch<T> {}

impl<T> Default for Batch<T> {
    fn default() -> Self {
        Batch { head: ptr::null_mut(), tail: ptr::null_mut(), owns: PhantomData }
    }
}

impl<T> Batch<T> {
    /// Whether nothing is gathered.
    pub fn is_empty(&self) -> bool {
        self.head.is_null()
    }

    /// Adds a value.
    pub fn push(&mut self, value: Placed<T>) {
        let node = value.into_raw().as_ptr();
        // SAFETY: `node` was owned by `value` and is the batch's now.
        unsafe { (*node).next = self.head };
        if self.tail.is_null() {
            self.tail = node;
        }
        self.head = node;
    }
}

impl<T> Drop for Batch<T> {
    fn drop(&mut self) {
        debug_assert!(self.is_empty() || std::thread::panicking(), "a batch of requests was dropped unanswered");
    }
}

/// A queue with many producers that is emptied all at once. On a cache line (pair) of its own.
///
/// # Invariants
/// `head` is null or leads through `next` to null over nodes that the inbox owns, newest first.
#[repr(align(128))]
pub struct Inbox<T> {
    head: AtomicPtr<Node<T>>,
}

impl<T> Default for Inbox<T> {
    fn default() -> Self {
        Inbox { head: AtomicPtr::new(ptr::null_mut()) }
    }
}

impl<T> Inbox<T> {
    /// Whether it was empty a moment ago.
    pub fn is_empty(&self) -> bool {
        self.head.load(Ordering::Acquire).is_null()
    }

    /// Hands over a batch. Lock-free; one compare-exchange when nobody interferes. An empty batch changes nothing. Whether the
    /// inbox was empty before.
    pub fn push(&self, batch: Batch<T>) -> bool {
        if batch.is_empty() {
            return false;
        }
        // SAFETY: the batch's chain is ours to link, and becomes the inbox's.
        let was_empty = unsafe { self.push_chain(batch.head, batch.tail) };
        std::mem::forget(batch);
        was_empty
    }

    /// Hands over one value.
    pub fn push_one(&self, value: Placed<T>) {
        let node = value.into_raw().as_ptr();
        // SAFETY: a chain of one, owned by `value` until now.
        unsafe { self.push_chain(node, node) };
    }

    /// # Safety
    /// `first` leads to `last` over nodes that the caller owns and gives up.
    unsafe fn push_chain(&self, first: *mut Node<T>, last: *mut Node<T>) -> bool {
        let mut old = self.head.load(Ordering::Relaxed);
        loop {
            // SAFETY: ours until the exchange succeeds.
            unsafe { (*last).next = old };
            // Release: what was written to the requests is visible to whoever takes them. The consumer's swap with nothing
            // in between continues the release sequence for older nodes.
            match self.head.compare_exchange_weak(old, first, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return old.is_null(),
                Err(now) => old = now,
            }
        }
    }

    /// Takes everything that has been handed over, oldest first. Wait-free.
    pub fn take_all(&self) -> List<T> {
        // A look before the swap: an empty inbox stays shared in the producers' caches.
        if self.head.load(Ordering::Relaxed).is_null() {
            return List::default();
        }
        let mut node = self.head.swap(ptr::null_mut(), Ordering::Acquire);
        let mut list = List { tail: node, ..List::default() };
        let mut older = ptr::null_mut::<Node<T>>();
        while !node.is_null() {
            // SAFETY: the swap made the whole chain ours. Turning it round yields the oldest first.
            let next = unsafe { std::mem::replace(&mut (*node).next, older) };
            older = node;
            list.len += 1;
            node = next;
        }
        list.head = older;
        list
    }
}

impl<T> Drop for Inbox<T> {
    fn drop(&mut self) {
        debug_assert!(self.is_empty() || std::thread::panicking(), "an inbox with requests in it was dropped");
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn drain(list: &mut List<u64>) -> Vec<u64> {
        std::iter::from_fn(|| list.pop_front().map(Placed::take)).collect()
    }

    #[test]
    fn an_inbox_keeps_the_order_within_and_between_batches() {
        let inbox = Inbox::default();
        for base in [0, 10, 20] {
            let mut batch = Batch::default();
            for i in 0..3 {
                batch.push(Placed::on_heap(base + i));
            }
            inbox.push(batch);
        }
        inbox.push_one(Placed::on_heap(99));
        let mut all = inbox.take_all();
        assert_eq!(all.len(), 10);
        assert_eq!(all.iter().copied().collect::<Vec<_>>(), [0, 1, 2, 10, 11, 12, 20, 21, 22, 99]);
        assert_eq!(drain(&mut all), [0, 1, 2, 10, 11, 12, 20, 21, 22, 99]);
        assert!(inbox.take_all().is_empty());
    }

    #[test]
    fn lists_append_and_forget_nothing() {
        let (mut a, mut b) = (List::default(), List::default());
        a.append(&mut b);
        assert!(a.is_empty());
        b.push_back(Placed::on_heap(1));
        a.append(&mut b);
        b.push_back(Placed::on_heap(2));
        b.push_back(Placed::on_heap(3));
        a.append(&mut b);
        assert!(b.is_empty());
        assert_eq!((a.len(), a.front()), (3, Some(&1)));
        a.iter_mut().for_each(|v| *v *= 10);
        assert_eq!(drain(&mut a), [10, 20, 30]);
        a.push_back(Placed::on_heap(4));
        assert_eq!(drain(&mut a), [4]);
    }

    #[test]
    fn producers_in_parallel_lose_and_reorder_nothing() {
        const PRODUCERS: u64 = 4;
        const EACH: u64 = if cfg!(miri) { 200 } else { 20_000 };
        let inbox = Arc::new(Inbox::default());
        let threads: Vec<_> = (0..PRODUCERS)
            .map(|p| {
                let inbox = inbox.clone();
                std::thread::spawn(move || {
                    let mut i = 0;
                    while i < EACH {
                        let mut batch = Batch::default();
                        for _ in 0..=(i % 5).min(EACH - i - 1) {
                            batch.push(Placed::on_heap((p, i)));
                            i += 1;
                        }
                        inbox.push(batch);
                    }
                })
            })
            .collect();
        let mut next = [0; PRODUCERS as usize];
        while next.iter().sum::<u64>() < PRODUCERS * EACH {
            let mut list = inbox.take_all();
            while let Some(value) = list.pop_front() {
                let (p, i) = value.take();
                assert_eq!(next[p as usize], i);
                next[p as usize] += 1;
            }
        }
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert!(inbox.is_empty());
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "dropped without an answer")]
    fn a_dropped_request_is_a_caught_bug() {
        drop(Placed::on_heap(1));
    }
}

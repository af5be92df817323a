//! Breadth first through every state that the world can reach, and backwards from the good ones.
//!
//! Owns the search. Leaves alone what a state is. A state is kept as 128 bits of hash; a violation is shown as the shortest way
//! to it, found again by walking the same choices.

use std::collections::{HashMap, VecDeque};
use std::hash::{Hash, Hasher};

use super::world::World;

#[derive(Debug)]
pub(crate) struct Explored {
    pub(crate) states: usize,
    pub(crate) steps: usize,
    pub(crate) deepest: u32,
    pub(crate) ran_at_source: usize,
    pub(crate) ran_at_target: usize,
}

/// Two sums over the same bytes: fast, and equal for two states only by an accident of one in 10^24 here.
#[derive(Default)]
struct Wide(u64, u64);

impl Hasher for Wide {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.1 =
            (self.1.rotate_left(41) ^ word.wrapping_add(self.0 >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    }

    fn write_u8(&mut self, word: u8) {
        self.write_u64(word.into());
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(word.into());
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 31
    }
}

fn key(world: &World) -> u128 {
    let mut hasher = Wide::default();
    world.hash(&mut hasher);
    let low = hasher.1 ^ hasher.1 >> 29;
    u128::from(hasher.finish()) << 64 | u128::from(low)
}

struct Search {
    start: World,
    seen: HashMap<u128, u32>,
    /// For each state: from which, by which of its choices, and how deep.
    from: Vec<(u32, u16, u32)>,
    queue: VecDeque<(u32, World)>,
    /// Steps that need no mishap, backwards.
    back: Vec<(u32, u32)>,
    good: Vec<u32>,
    explored: Explored,
}

pub(crate) fn explore(start: World) -> Result<Explored, String> {
    let mut search = Search {
        start: start.clone(),
        seen: HashMap::new(),
        from: Vec::new(),
        queue: VecDeque::new(),
        back: Vec::new(),
        good: Vec::new(),
        explored: Explored {
            states: 0,
            steps: 0,
            deepest: 0,
            ran_at_source: 0,
            ran_at_target: 0,
        },
    };
    search.visit(start, 0, 0, 0);
    while let Some((id, world)) = search.queue.pop_front() {
        search.expand(id, &world)?;
    }
    search.all_can_run()?;
    search.explored.states = search.seen.len();
    Ok(search.explored)
}

impl Search {
    fn visit(&mut self, world: World, from: u32, choice: u16, depth: u32) -> u32 {
        let next = self.seen.len() as u32;
        let id = *self.seen.entry(key(&world)).or_insert(next);
        if id == next {
            self.from.push((from, choice, depth));
            self.explored.deepest = self.explored.deepest.max(depth);
            self.explored.ran_at_source += usize::from(world.source_runs());
            self.explored.ran_at_target += usize::from(world.target_runs());
            if world.is_good() {
                self.good.push(id);
            }
            self.queue.push_back((id, world));
        }
        id
    }

    fn expand(&mut self, id: u32, world: &World) -> Result<(), String> {
        let depth = self.from[id as usize].2 + 1;
        for (choice, step) in world.steps(false).into_iter().enumerate() {
            self.explored.steps += 1;
            let (mishap, broken) = (step.mishap, step.world.broken());
            let next = self.visit(step.world, id, choice as u16, depth);
            if let Some(broken) = broken {
                return Err(format!("{broken}\n{}", self.way_to(next)));
            }
            if !mishap && next != id {
                self.back.push((next, id));
            }
        }
        Ok(())
    }

    /// From every state somebody gets to run the VM without any further mishap.
    fn all_can_run(&mut self) -> Result<(), String> {
        self.back.sort_unstable();
        let mut can = vec![false; self.from.len()];
        let mut stack = std::mem::take(&mut self.good);
        while let Some(id) = stack.pop() {
            if std::mem::replace(&mut can[id as usize], true) {
                continue;
            }
            let first = self.back.partition_point(|(to, _)| *to < id);
            let to_id = self.back[first..].iter().take_while(|(to, _)| *to == id);
            stack.extend(to_id.map(|(_, from)| *from).filter(|from| !can[*from as usize]));
        }
        match can.iter().position(|can| !can) {
            Some(stuck) => Err(format!(
                "nobody can be made to run the VM\n{}",
                self.way_to(stuck as u32)
            )),
            None => Ok(()),
        }
    }

    fn way_to(&self, mut id: u32) -> String {
        let mut choices = Vec::new();
        while id != 0 {
            let (from, choice, _) = self.from[id as usize];
            choices.push(choice);
            id = from;
        }
        let mut world = self.start.clone();
        let mut way = String::new();
        for choice in choices.into_iter().rev() {
            let step = world.steps(true).swap_remove(choice.into());
            way.push_str(&format!("  {}\n", step.what));
            world = step.world;
        }
        format!("{way}{world:#?}")
    }
}

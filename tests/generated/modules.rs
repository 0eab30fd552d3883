//! The modules: random ones of several kinds, each the same for the same seed.

use arbitrary::{Arbitrary, Unstructured};
use harness::{metadata, metadata_section};
use wasm_smith::{Config, Module};

use crate::entry::{self, Shape};

/// What a module may say at most, whatever it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Says {
    /// Nothing that is a verdict.
    Nothing,
    /// Yes, once its random part has returned.
    Yes,
    /// No, likewise.
    No,
}

/// One module.
#[derive(Debug)]
pub(crate) struct Generated {
    pub(crate) kind: &'static str,
    pub(crate) module: Vec<u8>,
    pub(crate) says: Says,
}

/// A stream of random numbers: SplitMix64.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 1).unwrap() % bound
    }

    fn chance(&mut self) -> bool {
        self.below(2) == 0
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.next().to_le_bytes()).flatten().take(length).collect()
    }
}

/// The module with that number in its round; the kinds take turns.
pub(crate) fn generate(random: &mut Random, number: usize) -> Generated {
    let shape = if random.chance() { entry::WAPC } else { entry::WASI };
    let (kind, mut module, says) = match number % 6 {
        0 => ("wild", wild(random), Says::Nothing),
        1 => ("linked", shaped(random, &shape.linked()), Says::Nothing),
        2 => ("damaged", damaged(random, &shape), Says::No),
        3 | 4 => ("serving", serving(random, &shape, true), Says::Yes),
        _ => ("serving", serving(random, &shape, false), Says::No),
    };
    module.extend(metadata_section(&metadata(shape.execution_mode)));
    Generated { kind, module, says }
}

/// Anything that is WebAssembly, also what the engine is not to understand.
fn wild(random: &mut Random) -> Vec<u8> {
    let choices = random.bytes(256);
    let mut config = Config::arbitrary(&mut Unstructured::new(&choices)).unwrap();
    config.max_funcs = config.max_funcs.min(50);
    config.max_instructions = config.max_instructions.min(200);
    config.generate_custom_sections = true;
    module(random, config)
}

/// With these imports and exports, and of what the engine understands.
fn shaped(random: &mut Random, shape: &str) -> Vec<u8> {
    let config = Config {
        module_shape: Some(wat::parse_str(shape).unwrap()),
        max_funcs: 40,
        max_instructions: 200,
        max_memory32_bytes: 64 << 20,
        max_table_elements: 10_000,
        max_tables: 4,
        disallow_traps: random.chance(),
        allow_start_export: random.chance(),
        exceptions_enabled: false,
        gc_enabled: false,
        memory64_enabled: false,
        // With host references a module compiles but is not instantiated.
        reference_types_enabled: random.below(4) == 0,
        relaxed_simd_enabled: false,
        threads_enabled: false,
        ..Config::default()
    };
    module(random, config)
}

fn module(random: &mut Random, config: Config) -> Vec<u8> {
    let length = 512 << random.below(6);
    let bytes = random.bytes(length);
    Module::new(config, &mut Unstructured::new(&bytes)).unwrap().to_bytes()
}

/// Accepts any settings; asked about a request, it runs random code and then says yes or no.
fn serving(random: &mut Random, shape: &Shape, yes: bool) -> Vec<u8> {
    let module = shaped(random, &shape.serving());
    let answer = if yes { entry::YES } else { entry::NO };
    entry::add(&module, shape, answer)
}

/// With a few wrong bytes, and sometimes without an end.
fn damaged(random: &mut Random, shape: &Shape) -> Vec<u8> {
    let mut module = serving(random, shape, false);
    for _ in 0..=random.below(4) {
        let at = random.below(module.len());
        module[at] = random.bytes(1)[0];
    }
    if random.chance() {
        module.truncate(random.below(module.len()));
    }
    module
}

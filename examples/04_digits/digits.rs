//! The images, and which of them no rank trains on.

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor};

/// Compiled in, so that the program runs wherever it is copied to. See ../data/README.md.
const CSV: &str = include_str!("../data/digits.csv");

/// The images are SIDE × SIDE pixels.
const SIDE: i64 = 8;

/// The ink of a black pixel.
const BLACK: f32 = 16.0;

/// Every fifth image is held out, from the first on: the same ones on all ranks and for every seed.
const HELD_OUT_EVERY: usize = 5;

/// Images (`[n, 1, 8, 8]`, 0 to 1) and the digits on them (`[n]`).
pub struct Images {
    pub pixels: Tensor,
    pub labels: Tensor,
}

/// The images to train on and the held-out ones.
pub fn load() -> Result<(Images, Images)> {
    let lines: Vec<&str> = CSV.lines().collect();
    let (held_out, training): (Vec<_>, Vec<_>) =
        lines.into_iter().enumerate().partition(|(line, _)| line % HELD_OUT_EVERY == 0);
    Ok((images(&training)?, images(&held_out)?))
}

fn images(lines: &[(usize, &str)]) -> Result<Images> {
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for (number, line) in lines {
        let values: Vec<f32> = line
            .split(',')
            .map(str::parse)
            .collect::<Result<_, _>>()
            .with_context(|| format!("digits.csv, line {}", number + 1))?;
        ensure!(
            values.len() == (SIDE * SIDE) as usize + 1,
            "digits.csv, line {}: 65 numbers expected",
            number + 1
        );
        let (label, ink) = values.split_last().expect("there are 65 values");
        pixels.extend(ink.iter().map(|ink| ink / BLACK));
        labels.push(*label);
    }
    let pixels = Tensor::from_slice(&pixels).view([-1, 1, SIDE, SIDE]);
    Ok(Images { pixels, labels: Tensor::from_slice(&labels).to_kind(Kind::Int64) })
}

impl Images {
    pub fn len(&self) -> usize {
        self.labels.numel()
    }

    /// The images at these positions.
    pub fn select(&self, positions: &[usize]) -> Images {
        let positions: Vec<i64> = positions.iter().map(|position| *position as i64).collect();
        let positions = Tensor::from_slice(&positions);
        Images {
            pixels: self.pixels.index_select(0, &positions),
            labels: self.labels.index_select(0, &positions),
        }
    }
}

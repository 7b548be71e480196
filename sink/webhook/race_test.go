//go:build race

package webhook

const raceDetector = true

//go:build long

package main

const rounds = 12

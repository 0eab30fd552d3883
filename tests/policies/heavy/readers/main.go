// A policy with the WASI contract whose request is read by several goroutines at once, and
// passed on by others. It accepts everything and says how much there was to read.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sync"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == "validate-settings" {
		fmt.Print(`{"valid":true}`)
		return
	}
	pieces := make(chan int)
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			buffer := make([]byte, 700)
			for {
				read, err := os.Stdin.Read(buffer)
				pieces <- read
				if err == io.EOF {
					return
				}
				if err != nil {
					panic(err)
				}
			}
		})
	}
	go func() {
		readers.Wait()
		close(pieces)
	}()
	total := 0
	for piece := range pieces {
		total += piece
	}
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	answer := map[string]any{"accepted": true, "message": fmt.Sprintf("%d bytes", total)}
	if err := json.NewEncoder(out).Encode(answer); err != nil {
		panic(err)
	}
}

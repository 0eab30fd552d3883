// Package term knows no terminal.
package term

// GetFdInfo says that it is none.
func GetFdInfo(any) (uintptr, bool) {
	return 0, false
}

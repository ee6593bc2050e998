package main

import (
	"bytes"
	"io"
	"os"
	"strings"
)

// spoolMemory is how much output stays in memory.
const spoolMemory = 4 << 20

// spool keeps the output until all of it is known to be right: in memory, and in a file without a name if it is large. The
// output of many small objects is several times the input. It is an inject.Output.
type spool struct {
	memory  bytes.Buffer // what is not in file yet
	file    *os.File
	written int64 // bytes in file
	noFile  bool  // there is no place for one

	last  byte // the last byte of the output, 0 before the first
	first bool // the next text is the first of a file
}

// begin separates the texts of two files.
func (s *spool) begin() { s.first = s.Size() > 0 }

// WriteString appends text. Between two files it writes a line of ---, unless there is one.
func (s *spool) WriteString(text string) (int, error) {
	if s.first && text != "" {
		s.first = false
		separator := ""
		if s.last != '\n' {
			separator = "\n"
		}
		if !strings.HasPrefix(text, "---") {
			separator += "---\n"
		}
		s.memory.WriteString(separator)
	}
	s.memory.WriteString(text)
	if text != "" {
		s.last = text[len(text)-1]
	}
	if s.memory.Len() > spoolMemory && !s.noFile {
		return len(text), s.flush()
	}
	return len(text), nil
}

// flush moves the text in memory to the file.
func (s *spool) flush() error {
	if s.file == nil {
		file, err := os.CreateTemp("", "pillionctl-")
		if err != nil { // such as a read-only file system
			s.noFile = true
			return nil
		}
		s.file = file
		if err := os.Remove(file.Name()); err != nil {
			return err
		}
	}
	n, err := s.memory.WriteTo(s.file)
	s.written += n
	return err
}

// Size returns the length of the output.
func (s *spool) Size() int64 { return s.written + int64(s.memory.Len()) }

// Truncate cuts the output to a former size.
func (s *spool) Truncate(size int64) error {
	if size >= s.written {
		s.memory.Truncate(int(size - s.written))
	} else {
		s.memory.Reset()
		if err := s.file.Truncate(size); err != nil {
			return err
		}
		if _, err := s.file.Seek(size, io.SeekStart); err != nil {
			return err
		}
		s.written = size
	}
	return nil
}

// writeTo writes the output to w. It can be called once.
func (s *spool) writeTo(w io.Writer) error {
	if s.file != nil {
		if _, err := s.file.Seek(0, io.SeekStart); err != nil {
			return err
		}
		if _, err := io.Copy(w, s.file); err != nil {
			return err
		}
	}
	_, err := s.memory.WriteTo(w)
	return err
}

func (s *spool) close() {
	if s.file != nil {
		s.file.Close()
	}
}

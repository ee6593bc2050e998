package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
)

// The flag values below say in their errors what would be right.

// portFlag adds a flag whose value is a TCP port.
func portFlag(flags *pflag.FlagSet, target *uint16, name, usage string) {
	flags.Var((*portValue)(target), name, usage)
}

type portValue uint16

func (v *portValue) String() string { return strconv.Itoa(int(*v)) }
func (v *portValue) Type() string   { return "port" }
func (v *portValue) Set(text string) error {
	port, err := capture.ParsePort(text)
	if err != nil {
		return err
	}
	*v = portValue(port)
	return nil
}

// durationFlag adds a flag whose value is a time span that is not negative.
func durationFlag(flags *pflag.FlagSet, target *time.Duration, name, usage string) {
	flags.Var((*durationValue)(target), name, usage)
}

type durationValue time.Duration

func (v *durationValue) String() string { return time.Duration(*v).String() }
func (v *durationValue) Type() string   { return "duration" }
func (v *durationValue) Set(text string) error {
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		return fmt.Errorf("not a time span: use a number with a unit, such as 500ms, 10s or 5m")
	}
	*v = durationValue(d)
	return nil
}

// countFlag adds a flag whose value is a number from zero.
func countFlag(flags *pflag.FlagSet, target *int, name, usage string) {
	flags.Var((*countValue)(target), name, usage)
}

type countValue int

func (v *countValue) String() string { return strconv.Itoa(int(*v)) }
func (v *countValue) Type() string   { return "count" }
func (v *countValue) Set(text string) error {
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return fmt.Errorf("not a count: use a whole number from 0 to %d", 1<<31-1)
	}
	*v = countValue(n)
	return nil
}

// choiceFlag adds a flag whose value is one of a few words, the first being the default.
func choiceFlag(flags *pflag.FlagSet, target *string, name, usage string, choices ...string) {
	*target = choices[0]
	flags.Var(&choiceValue{target, choices}, name, usage)
}

type choiceValue struct {
	target  *string
	choices []string
}

func (v *choiceValue) String() string { return *v.target }
func (v *choiceValue) Type() string   { return strings.Join(v.choices, "|") }
func (v *choiceValue) Set(text string) error {
	for _, choice := range v.choices {
		if text == choice {
			*v.target = text
			return nil
		}
	}
	return fmt.Errorf("use one of %s", strings.Join(v.choices, ", "))
}

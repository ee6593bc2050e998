package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// parsed adds a flag whose text is turned into a value as soon as it is set, so that a bad one is reported with the
// flag's or the variable's name. The value that stands for text must be in the place already.
func parsed[T any](flags *pflag.FlagSet, into *T, parse func(string) (T, error), name, short, text, kind, usage string) *pflag.Flag {
	return flags.VarPF(&parsedValue[T]{into: into, parse: parse, text: text, kind: kind}, name, short, usage)
}

// parsedSwitch adds a flag that is what into holds, mostly off, and on when it stands alone.
func parsedSwitch(flags *pflag.FlagSet, into *bool, name, short, usage string) {
	parsed(flags, into, parseSwitch, name, short, strconv.FormatBool(*into), "bool", usage).NoOptDefVal = "true"
}

func parseSwitch(text string) (bool, error) {
	on, err := strconv.ParseBool(text)
	if err != nil {
		return false, fmt.Errorf("%q is neither on nor off: use true or false", text)
	}
	return on, nil
}

type parsedValue[T any] struct {
	into  *T
	parse func(string) (T, error)
	text  string
	kind  string
}

func (v *parsedValue[T]) String() string { return v.text }
func (v *parsedValue[T]) Type() string   { return v.kind }

func (v *parsedValue[T]) Set(text string) error {
	value, err := v.parse(text)
	if err == nil {
		*v.into, v.text = value, text
	}
	return err
}

// flagError tells a bad value, which is a failure like any other, from a command line that makes no sense. istio-iptables
// draws the line elsewhere: what it parses itself belongs to the command line's form.
func flagError(cmd *cobra.Command, err error) error {
	var invalid *pflag.InvalidValueError
	if !errors.As(err, &invalid) {
		return usageError{err}
	}
	formal := []string{"bool", "uint16", "duration", "level"}
	if cmd.Name() == "istio-iptables" && slices.Contains(formal, invalid.GetFlag().Value.Type()) {
		return usageError{err}
	}
	return err
}

func noArguments(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("unexpected argument %q: every value belongs to a flag", args[0])}
	}
	return nil
}
